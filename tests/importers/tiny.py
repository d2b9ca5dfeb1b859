"""Small ONNX files, and what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quernstone.importers import Graph, read_onnx, write_onnx

Array = NDArray[Any]

# fp32 sums in another order: about 1000 terms of size 1 at 2^-24 each, and a few layers.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """Names are apart by spaces; "_" is an input that is absent."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), **attributes)


def model(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Array],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> Any:
    """A model whose outputs have the types that their nodes make."""
    values = [helper.make_tensor_value_info(n, dtype, shape) for n, shape in inputs.items()]
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    made = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(list(nodes), "tiny", values, made, tensors)
    ir = 7 if opset < 13 else 10
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def write(proto: Any, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def oracle(path: Path, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs of a file by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def check(path: Path, inputs: Mapping[str, Array], graph: Graph | None = None) -> Graph:
    """The graph of a file gives what the file gives: as read, unfused, and written again."""
    want = oracle(path, inputs)
    fused = read_onnx(path) if graph is None else graph
    close(fused, inputs, want)
    close(read_onnx(path, fuse=False), inputs, want)
    again = path.with_suffix(".again.onnx")
    write_onnx(fused, again)
    onnx.checker.check_model(onnx.load(again), full_check=True)
    for got, expected in zip(oracle(again, inputs), want, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE)
    close(read_onnx(again), inputs, want)
    return fused


def close(graph: Graph, inputs: Mapping[str, Array], want: Sequence[Array]) -> None:
    got = list(graph.run(inputs).values())
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.detach().numpy(), theirs, **TOLERANCE)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]
