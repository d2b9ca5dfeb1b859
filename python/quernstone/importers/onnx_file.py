"""The content of an ONNX file, checked: nodes, constants as arrays, ranks of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from quernstone.importers.graph import Array, Value

OLDEST, NEWEST = 7, 28
"""Versions of the operator set."""

# Of names of dtypes that a graph computes with; others become these.
_DTYPES = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "FLOAT16": "float32",
    "BFLOAT16": "float32",
    "INT64": "int64",
    "INT32": "int32",
    "INT16": "int16",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class OnnxNode:
    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    nodes: list[OnnxNode]
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Array]
    ranks: dict[str, int]
    """Of the tensors for which the file's operators tell them."""
    metadata: dict[str, str]
    opset: int

    @property
    def names(self) -> set[str]:
        """Of all tensors and nodes."""
        found = {value.name for value in self.inputs} | set(self.constants)
        for node in self.nodes:
            found |= {node.name, *node.inputs, *node.outputs}
        return found


def dtype_name(number: int) -> str:
    """The name in torch of ONNX's number of a type."""
    kind = import_module("onnx").TensorProto.DataType.Name(number)
    if kind not in _DTYPES:
        raise ValueError(f"type {kind}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[kind]


def load(path: Path) -> Model:
    """Reads and checks an ONNX file.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package onnx is missing.
        ValueError: it is no whole ONNX file; the message names the path and what is wrong.
    """
    try:
        onnx = import_module("onnx")
    except ImportError as error:
        raise ImportError("onnx is missing: pip install 'quernstone[pim]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    message = import_module("google.protobuf.message")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"{path}: not a whole ONNX file ({error})") from None
    try:
        return _model(onnx, proto, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model(onnx: Any, proto: Any, folder: Path) -> Model:
    graph = proto.graph
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not opsets or not graph.output:
        raise ValueError("not a whole ONNX file (no opset or no output)")
    if not OLDEST <= opsets[0] <= NEWEST:
        raise ValueError(f"opset {opsets[0]}, expected {OLDEST} to {NEWEST}")
    if graph.sparse_initializer:
        raise ValueError("sparse weights are not supported")
    constants = {
        tensor.name: _array(onnx, tensor, tensor.name, folder) for tensor in graph.initializer
    }
    nodes = []
    for node in graph.node:
        attributes = {a.name: _attribute(onnx, a, node, folder) for a in node.attribute}
        if node.op_type == "Constant" and (value := _value(attributes)) is not None:
            constants[node.output[0]] = value
        else:
            nodes.append((node, attributes))
    return Model(
        _named(nodes),
        tuple(_input(value) for value in graph.input if value.name not in constants),
        tuple(value.name for value in graph.output),
        constants,
        _ranks(onnx, proto, constants),
        {entry.key: entry.value for entry in proto.metadata_props},
        opsets[0],
    )


def _named(nodes: list[tuple[Any, dict[str, Any]]]) -> list[OnnxNode]:
    """Every node with a name of its own: the file's, or that of its first output."""
    counts: dict[str, int] = {}
    for node, _ in nodes:
        counts[node.name] = counts.get(node.name, 0) + 1
    named = []
    for node, attributes in nodes:
        if not node.output:
            raise ValueError(f"{node.op_type} {node.name!r}: no output")
        own = node.name and counts[node.name] == 1
        name = node.name if own else next(out for out in node.output if out)
        named.append(
            OnnxNode(
                node.op_type,
                node.domain,
                name,
                tuple(node.input),
                tuple(node.output),
                attributes,
            )
        )
    return named


def _input(value: Any) -> Value:
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type":
        raise ValueError(f"input {value.name!r}: no tensor")
    shape = None
    if kind.HasField("shape"):
        # Some writers say -1 or 0 where they mean that an extent is free.
        shape = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in kind.shape.dim
        )
    return Value(value.name, dtype_name(kind.elem_type), shape)


def _value(attributes: dict[str, Any]) -> Array | None:
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32),
                        ("value_int", np.int64), ("value_ints", np.int64)):  # fmt: skip
        if name in attributes:
            return np.array(attributes[name], dtype)
    value = attributes.get("value")
    return value if isinstance(value, np.ndarray) else None


def _attribute(onnx: Any, attribute: Any, node: Any, folder: Path) -> Any:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _array(onnx, attribute.t, node.name or node.output[0], folder)
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        return None
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [item.decode("utf-8", "replace") for item in value]
    return list(value) if attribute.type in (6, 7) else value


def _array(onnx: Any, tensor: Any, name: str, folder: Path) -> Array:
    """The numbers of a tensor; nothing is allocated before they are known to be there."""
    shape = tuple(tensor.dims)
    dtype = dtype_name(tensor.data_type)
    if any(n < 0 for n in shape):
        raise ValueError(f"{name!r}: got shape {shape}, expected extents of 0 or more")
    size, width = math.prod(shape), np.dtype(_stored(onnx, tensor)).itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raw = _external(tensor, name, folder)
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        listed = max(
            len(getattr(tensor, part))
            for part in ("float_data", "int32_data", "int64_data", "double_data")
        )
        if listed != size:
            raise ValueError(f"{name!r}: got {listed} numbers, expected {shape}")
        return np.array(onnx.numpy_helper.to_array(tensor)).astype(dtype)
    if len(raw) != size * width:
        raise ValueError(f"{name!r}: got {len(raw)} bytes, expected {size * width} for {shape}")
    if onnx.TensorProto.DataType.Name(tensor.data_type) == "BFLOAT16":
        high = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return high.view("<f4").reshape(shape).copy()
    return np.frombuffer(raw, _stored(onnx, tensor)).reshape(shape).astype(dtype)


def _stored(onnx: Any, tensor: Any) -> str:
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    return {"FLOAT16": "<f2", "BFLOAT16": "<u2"}.get(kind, _DTYPES[kind])


def _external(tensor: Any, name: str, folder: Path) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r}: external data at {location!r}, outside the model's folder")
    if not file.is_file():
        raise ValueError(f"{name!r}: external data at {location!r}, where no file is")
    numbers = {"offset": 0, "length": file.stat().st_size}
    for key in numbers:
        try:
            numbers[key] = int(entries.get(key, numbers[key] - numbers["offset"]))
        except ValueError:
            got = entries[key]
            raise ValueError(f"{name!r}: {key}: got {got!r}, expected a whole number") from None
    offset, length = numbers["offset"], numbers["length"]
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ValueError(f"{name!r}: {length} bytes at {offset} of {location!r} are not there")
    with file.open("rb") as opened:
        opened.seek(offset)
        data: bytes = opened.read(length)
        return data


def _ranks(onnx: Any, proto: Any, constants: dict[str, Array]) -> dict[str, int]:
    """What ONNX's own shape inference finds, helped over reshapes to computed shapes."""
    lengths = {name: array.size for name, array in constants.items() if array.ndim == 1}
    ranks = {name: array.ndim for name, array in constants.items()}
    while True:
        try:
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (RuntimeError, ValueError):
            # It is of help, no more: what is wrong shows when the nodes are translated.
            return ranks
        for part in (proto.graph.input, proto.graph.value_info, proto.graph.output):
            for value in part:
                kind = value.type.tensor_type
                if kind.HasField("shape"):
                    ranks[value.name] = len(kind.shape.dim)
                    if len(kind.shape.dim) == 1 and kind.shape.dim[0].HasField("dim_value"):
                        lengths[value.name] = kind.shape.dim[0].dim_value
        told = {value.name for value in proto.graph.value_info if value.name in ranks}
        new = [
            onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, [None] * lengths[by])
            for node in proto.graph.node
            if node.op_type == "Reshape"
            for by, out in [(node.input[1], node.output[0])]
            if by in lengths and out not in ranks and out not in told
        ]
        if not new:
            return ranks
        names = {value.name for value in new}
        kept = [value for value in proto.graph.value_info if value.name not in names]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend([*kept, *new[:1]])
