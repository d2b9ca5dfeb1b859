"""Networks of ONNX, safetensors and GGUF files as one small layer graph."""

from quernstone.importers.graph import Graph, Hook, Node, Value, evaluate
from quernstone.importers.onnx_reader import read_onnx

__all__ = ["Graph", "Hook", "Node", "Value", "evaluate", "read_onnx"]
