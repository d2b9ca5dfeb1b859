"""Writing a graph as an ONNX file of opset 17.

Source: the ONNX operator specification. Oracle: onnxruntime.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from quernstone._files import write_whole
from quernstone.importers.graph import Array, Graph, Node

OPSET = 17
_IR_VERSION = 8
# What a protobuf message may hold.
_MOST_BYTES = 2**31 - 1
_END = np.iinfo(np.int64).max


def write_onnx(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Writes a graph as an ONNX file, which replaces what the path held in one step.

    Constants and tensors keep their names; the weight of a linear layer is written as the
    [in, out] matrix of MatMul. Ops that the opset does not have are spelled out.

    Raises:
        ImportError: the package onnx is missing.
        ValueError: the file would be larger than ONNX allows without external data.
    """
    try:
        onnx = import_module("onnx")
    except ImportError as error:
        raise ImportError("onnx is missing: pip install 'quernstone[pim]'") from error
    size = sum(array.nbytes for array in graph.constants.values())
    if size > _MOST_BYTES:
        raise ValueError(f"graph: got {size} bytes of constants, expected {_MOST_BYTES} or fewer")
    writer = _Writer(onnx, graph)
    for node in graph.nodes:
        WRITE.get(node.op, _same)(writer, node)
    write_whole(path, writer.model().SerializeToString())


class _Writer:
    def __init__(self, onnx: Any, graph: Graph) -> None:
        self.onnx, self.graph = onnx, graph
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = dict(graph.constants)
        self.taken = {name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
        self.taken |= set(graph.constants) | {value.name for value in graph.inputs}
        self.uses: dict[str, int] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.uses[name] = self.uses.get(name, 0) + 1

    def model(self) -> Any:
        helper, of = self.onnx.helper, self.graph
        values = [
            helper.make_tensor_value_info(v.name, self.kind(v.dtype), v.shape) for v in of.inputs
        ]
        # The type of an output is what its node makes; ONNX wants it, and shapes may stay out.
        outputs = [helper.make_empty_tensor_value_info(name) for name in of.outputs]
        used = {name for node in self.nodes for name in node.input} | set(of.outputs)
        tensors = [
            self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
            for name, array in self.constants.items()
            if name in used
        ]
        graph = helper.make_graph(self.nodes, "quernstone", values, outputs, tensors)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
            producer_name="quernstone",
        )
        helper.set_model_props(model, dict(of.metadata))
        inferred = self.onnx.shape_inference.infer_shapes(model, strict_mode=True)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        return model

    def kind(self, dtype: str) -> int:
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def emit(
        self,
        node: Node,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds an ONNX node; without `outputs` it makes a tensor of a new name."""
        if outputs is None:
            outputs = (self.fresh(f"{node.outputs[0]}/{op}"),)
        name = node.name if tuple(outputs) == node.outputs else outputs[0]
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, name, **attributes))
        return outputs[0]

    def constant(self, node: Node, value: Any, dtype: Any) -> str:
        name = self.fresh(f"{node.outputs[0]}/constant")
        self.constants[name] = np.array(value, dtype)
        return name

    def number(self, node: Node, value: float) -> str:
        return self.constant(node, value, np.float32)

    def integers(self, node: Node, *values: int) -> str:
        return self.constant(node, values, np.int64)

    def fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.taken:
            count += 1
            unique = f"{name}.{count}"
        self.taken.add(unique)
        return unique


def _same(w: _Writer, n: Node) -> None:
    w.emit(n, _NAMES[n.op], n.inputs, n.outputs)


def _spatial(n: Node) -> dict[str, Any]:
    sides = n.attributes["padding"]
    spatial = {
        "strides": list(n.attributes["stride"]),
        "pads": [before for before, _ in sides] + [after for _, after in sides],
    }
    if "dilation" in n.attributes:
        spatial["dilations"] = list(n.attributes["dilation"])
    return spatial


def _conv(w: _Writer, n: Node) -> None:
    options = {**_spatial(n), "group": n.attributes.get("groups", 1)}
    if n.op == "conv_transpose":
        options["output_padding"] = list(n.attributes["output_padding"])
        w.emit(n, "ConvTranspose", n.inputs, n.outputs, **options)
    else:
        w.emit(n, "Conv", n.inputs, n.outputs, **options)


def _linear(w: _Writer, n: Node) -> None:
    weight = n.inputs[1]
    if weight in w.graph.constants and w.uses[weight] == 1:
        w.constants[weight] = w.graph.constants[weight].T
    else:
        weight = w.emit(n, "Transpose", [weight], perm=[1, 0])
    bias = n.input("bias")
    product = w.emit(n, "MatMul", [n.inputs[0], weight], None if bias else n.outputs)
    if bias:
        w.emit(n, "Add", [product, bias], n.outputs)


def _lstm(w: _Writer, n: Node) -> None:
    weight, recurrent = (w.graph.weight(n, role) for role in ("weight", "recurrent"))
    d = recurrent.shape[1]
    # From input, forget, cell, output to ONNX's input, output, forget, cell.
    order = np.r_[0:d, 3 * d : 4 * d, d : 2 * d, 2 * d : 3 * d]
    inputs = [n.inputs[0]]
    inputs += [w.constant(n, m[order][None], m.dtype) for m in (weight, recurrent)]
    inputs.append("")
    if n.input("bias"):
        bias = w.graph.weight(n, "bias")[order]
        inputs[-1] = w.constant(n, np.concatenate([bias, 0 * bias])[None], bias.dtype)
    inputs.append("")
    for role in ("hidden", "cell"):
        state = n.input(role)
        inputs.append(w.emit(n, "Unsqueeze", [state, w.integers(n, 0)]) if state else "")
    results = [w.fresh(f"{n.outputs[0]}/{part}") for part in ("y", "h", "c")]
    direction = "reverse" if n.attributes.get("reverse", False) else "forward"
    w.emit(n, "LSTM", inputs, results, hidden_size=d, direction=direction)
    for result, output, axis in zip(results, n.outputs, (1, 0, 0), strict=False):
        w.emit(n, "Squeeze", [result, w.integers(n, axis)], [output])


def _attention(w: _Writer, n: Node) -> None:
    q, k, v = n.inputs[:3]
    logits = w.emit(n, "MatMul", [q, w.emit(n, "Transpose", [k], perm=[0, 1, 3, 2])])
    if n.attributes["scale"] != 1:
        logits = w.emit(n, "Mul", [logits, w.number(n, n.attributes["scale"])])
    mask = n.input("mask")
    if mask:
        logits = w.emit(n, "Add", [logits, mask])
    if n.attributes.get("causal", False):
        logits = _causal(w, n, logits)
    weights = w.emit(n, "Softmax", [logits], axis=-1)
    w.emit(n, "MatMul", [weights, v], n.outputs)


def _causal(w: _Writer, n: Node, logits: str) -> str:
    """Minus infinity where the key's place is beyond the query's."""
    zero, one = w.constant(n, 0, np.int64), w.constant(n, 1, np.int64)
    shape = w.emit(n, "Shape", [logits], start=-2)
    t, s = (w.emit(n, "Gather", [shape, at], axis=0) for at in (zero, one))
    query = w.emit(n, "Add", [w.emit(n, "Range", [zero, t, one]), w.emit(n, "Sub", [s, t])])
    place = w.emit(n, "Unsqueeze", [query, w.integers(n, 1)])
    later = w.emit(n, "Greater", [w.emit(n, "Range", [zero, s, one]), place])
    return w.emit(n, "Where", [later, w.number(n, -math.inf), logits])


def _layer_norm(w: _Writer, n: Node) -> None:
    if n.input("weight") is None:
        raise ValueError(f"layer_norm {n.name!r}: got no weight, expected one")
    options = {"axis": -1, "epsilon": n.attributes["eps"]}
    w.emit(n, "LayerNormalization", n.inputs, n.outputs, **options)


def _rms_norm(w: _Writer, n: Node) -> None:
    x, weight = n.inputs
    mean = w.emit(n, "ReduceMean", [w.emit(n, "Mul", [x, x])], axes=[-1])
    root = w.emit(n, "Sqrt", [w.emit(n, "Add", [mean, w.number(n, n.attributes["eps"])])])
    w.emit(n, "Mul", [w.emit(n, "Div", [x, root]), weight], n.outputs)


def _rotary(w: _Writer, n: Node) -> None:
    """The angles are computed in the file, from the number of steps there are."""
    (x,) = n.inputs
    zero, one = w.constant(n, 0, np.int64), w.constant(n, 1, np.int64)
    t, d = (
        w.emit(n, "Gather", [w.emit(n, "Shape", [x], start=-2), at], axis=0) for at in (zero, one)
    )
    half = w.emit(n, "Div", [d, w.constant(n, 2, np.int64)])
    floats = w.kind("float32")
    pair = w.emit(n, "Cast", [w.emit(n, "Range", [zero, half, one])], to=floats)
    share = w.emit(n, "Div", [pair, w.emit(n, "Cast", [half], to=floats)])
    minus = w.emit(n, "Neg", [share])
    rate = w.emit(n, "Pow", [w.number(n, n.attributes["base"]), minus])
    step = w.emit(n, "Cast", [w.emit(n, "Range", [zero, t, one])], to=floats)
    angle = w.emit(n, "Mul", [w.emit(n, "Unsqueeze", [step, w.integers(n, 1)]), rate])
    cos, sin = w.emit(n, "Cos", [angle]), w.emit(n, "Sin", [angle])
    first, second = w.fresh(f"{n.outputs[0]}/first"), w.fresh(f"{n.outputs[0]}/second")
    w.emit(n, "Split", [x], [first, second], axis=-1)
    turned = [
        w.emit(n, "Sub", [w.emit(n, "Mul", [first, cos]), w.emit(n, "Mul", [second, sin])]),
        w.emit(n, "Add", [w.emit(n, "Mul", [second, cos]), w.emit(n, "Mul", [first, sin])]),
    ]
    w.emit(n, "Concat", turned, n.outputs, axis=-1)


def _gelu(w: _Writer, n: Node) -> None:
    (x,) = n.inputs
    if n.attributes.get("tanh", False):
        cube = w.emit(n, "Mul", [x, w.emit(n, "Mul", [x, x])])
        inner = w.emit(n, "Add", [x, w.emit(n, "Mul", [cube, w.number(n, 0.044715)])])
        scaled = w.emit(n, "Mul", [inner, w.number(n, math.sqrt(2 / math.pi))])
        bent = w.emit(n, "Tanh", [scaled])
    else:
        bent = w.emit(n, "Erf", [w.emit(n, "Mul", [x, w.number(n, math.sqrt(0.5))])])
    half = w.emit(n, "Mul", [x, w.number(n, 0.5)])
    w.emit(n, "Mul", [half, w.emit(n, "Add", [bent, w.number(n, 1.0)])], n.outputs)


def _silu(w: _Writer, n: Node) -> None:
    w.emit(n, "Mul", [n.inputs[0], w.emit(n, "Sigmoid", n.inputs)], n.outputs)


def _clip(w: _Writer, n: Node) -> None:
    bounds = [w.number(n, n.attributes[side]) for side in ("low", "high")]
    w.emit(n, "Clip", [*n.inputs, *bounds], n.outputs)


def _pool(w: _Writer, n: Node) -> None:
    options = {
        "kernel_shape": list(n.attributes["kernel"]),
        "ceil_mode": int(n.attributes.get("ceil", False)),
        **_spatial(n),
    }
    if n.op == "avg_pool":
        options["count_include_pad"] = int(n.attributes.get("count_padding", False))
        w.emit(n, "AveragePool", n.inputs, n.outputs, **options)
    else:
        w.emit(n, "MaxPool", n.inputs, n.outputs, **options)


def _reduce(w: _Writer, n: Node) -> None:
    axes, keep = n.attributes.get("axes"), int(n.attributes.get("keep", True))
    if n.op == "sum":
        inputs = [*n.inputs, w.integers(n, *axes)] if axes else n.inputs
        w.emit(n, "ReduceSum", inputs, n.outputs, keepdims=keep)
        return
    name = {"mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin"}[n.op]
    options = {"axes": list(axes)} if axes else {}
    w.emit(n, name, n.inputs, n.outputs, keepdims=keep, **options)


def _squeeze(w: _Writer, n: Node) -> None:
    axes = w.integers(n, *n.attributes["axes"])
    w.emit(n, n.op.capitalize(), [*n.inputs, axes], n.outputs)


def _slice(w: _Writer, n: Node) -> None:
    axes, steps = (w.integers(n, *n.attributes[key]) for key in ("axes", "steps"))
    w.emit(n, "Slice", [*n.inputs, axes, steps], n.outputs)


def _split(w: _Writer, n: Node) -> None:
    sizes = n.attributes.get("sizes")
    inputs = [*n.inputs, w.integers(n, *sizes)] if sizes else n.inputs
    w.emit(n, "Split", inputs, n.outputs, axis=n.attributes["axis"])


def _pad(w: _Writer, n: Node) -> None:
    mode = n.attributes.get("mode", "constant")
    value = w.number(n, n.attributes.get("value", 0.0))
    mode = {"replicate": "edge"}.get(mode, mode)
    w.emit(n, "Pad", [*n.inputs, value] if mode == "constant" else n.inputs, n.outputs, mode=mode)


def _resize(w: _Writer, n: Node) -> None:
    options = {"mode": n.attributes["mode"], "nearest_mode": "floor"}
    options["coordinate_transformation_mode"] = "asymmetric"
    if options["mode"] == "linear":
        corners = n.attributes.get("align_corners", False)
        options["coordinate_transformation_mode"] = "align_corners" if corners else "half_pixel"
    scales = n.attributes.get("scales")
    if scales is not None:
        inputs = [n.inputs[0], "", w.constant(n, [1, 1, *scales], np.float32)]
    else:
        leading = w.emit(n, "Shape", n.inputs[:1], end=2)
        size = w.emit(n, "Concat", [leading, n.inputs[1]], axis=0)
        inputs = [n.inputs[0], "", "", size]
    w.emit(n, "Resize", inputs, n.outputs, **options)


def _fill(w: _Writer, n: Node) -> None:
    value = np.array([n.attributes["value"]], n.attributes["dtype"])
    tensor = w.onnx.numpy_helper.from_array(value)
    w.emit(n, "ConstantOfShape", n.inputs, n.outputs, value=tensor)


_CAPITALISED = (
    *("relu", "sigmoid", "tanh", "erf", "exp", "log", "sqrt", "reciprocal", "neg", "abs"),
    *("floor", "ceil", "sin", "cos", "add", "sub", "mul", "div", "pow"),
    *("equal", "less", "greater", "where", "expand", "tile", "reshape", "shape"),
)
_NAMES = {
    **{name: name.capitalize() for name in _CAPITALISED},
    "logical_not": "Not",
    "logical_and": "And",
    "logical_or": "Or",
    "maximum": "Max",
    "minimum": "Min",
    "arange": "Range",
    "matmul": "MatMul",
    "hard_swish": "HardSwish",
}
_KEPT: dict[str, tuple[str, Mapping[str, str]]] = {
    "softmax": ("Softmax", {"axis": "axis"}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": "alpha", "beta": "beta"}),
    "leaky_relu": ("LeakyRelu", {"alpha": "alpha"}),
    "flatten": ("Flatten", {"axis": "axis"}),
    "transpose": ("Transpose", {"axes": "perm"}),
    "concat": ("Concat", {"axis": "axis"}),
    "gather": ("Gather", {"axis": "axis"}),
}


def _renamed(w: _Writer, n: Node) -> None:
    name, names = _KEPT[n.op]
    w.emit(n, name, n.inputs, n.outputs, **{names[key]: v for key, v in n.attributes.items()})


WRITE: dict[str, Callable[[_Writer, Node], object]] = {
    **dict.fromkeys(_KEPT, _renamed),
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "embedding": lambda w, n: w.emit(n, "Gather", n.inputs[::-1], n.outputs, axis=0),
    "lstm": _lstm,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "gelu": _gelu,
    "silu": _silu,
    "clip": _clip,
    "max_pool": _pool,
    "avg_pool": _pool,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    "squeeze": _squeeze,
    "unsqueeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "resize": _resize,
    "fill": _fill,
    "cast": lambda w, n: (
        w.emit(n, "Cast", n.inputs, n.outputs, to=w.kind(n.attributes["dtype"])) and None
    ),
}
