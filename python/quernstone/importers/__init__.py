"""Networks of ONNX, safetensors and GGUF files as one small layer graph."""

from quernstone.importers.architectures import from_state_dict
from quernstone.importers.file import write_safetensors
from quernstone.importers.graph import Graph, Hook, Node, Value, evaluate
from quernstone.importers.onnx_reader import read_onnx
from quernstone.importers.onnx_writer import write_onnx
from quernstone.importers.read import read, read_llama_gguf, read_safetensors

__all__ = [
    "Graph",
    "Hook",
    "Node",
    "Value",
    "evaluate",
    "from_state_dict",
    "read",
    "read_llama_gguf",
    "read_onnx",
    "read_safetensors",
    "write_onnx",
    "write_safetensors",
]
