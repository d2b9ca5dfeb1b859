"""What each operator of ONNX is in a graph.

Source: the ONNX operator specification, opsets 7 to 28. Oracles: onnxruntime, ONNX's own cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quernstone.importers.onnx_file import OnnxNode, dtype_name
from quernstone.importers.onnx_translation import Translation, Unsupported

# Of a whole number's type, what stands for "to the end".
_END = np.iinfo(np.int64).max


def _direct(op: str, **fixed: Any) -> Callable[[Translation, OnnxNode], None]:
    def translate(r: Translation, n: OnnxNode) -> None:
        r.emit(n, op, n.inputs, n.outputs, **fixed)

    return translate


def _identity(r: Translation, n: OnnxNode) -> None:
    r.same(n.outputs[0], n.inputs[0])


def _dropout(r: Translation, n: OnnxNode) -> None:
    if r.number(n, 2, np.False_):
        raise Unsupported("training mode")
    _identity(r, n)


def _constant(r: Translation, n: OnnxNode) -> None:
    """What `load` did not take as a constant already."""
    raise Unsupported("it holds no tensor of numbers")


def _spatial(r: Translation, n: OnnxNode, kernel: Sequence[int]) -> dict[str, Any]:
    a, axes = n.attributes, len(kernel)
    auto = a.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise Unsupported(f"auto_pad {auto}")
    pads = a.get("pads", [0] * 2 * axes) if auto == "NOTSET" else [0] * 2 * axes
    return {
        "stride": tuple(a.get("strides", [1] * axes)),
        "padding": tuple(zip(pads[:axes], pads[axes:], strict=True)),
        "dilation": tuple(a.get("dilations", [1] * axes)),
    }


def _conv(r: Translation, n: OnnxNode) -> None:
    weight = r.number(n, 1)
    spatial = _spatial(r, n, weight.shape[2:])
    groups = n.attributes.get("group", 1)
    if n.op == "ConvTranspose":
        if "output_shape" in n.attributes:
            raise Unsupported("output_shape")
        extra = n.attributes.get("output_padding", [0] * (weight.ndim - 2))
        spatial["output_padding"] = tuple(extra)
        r.emit(n, "conv_transpose", n.inputs, n.outputs, **spatial, groups=groups)
    else:
        r.emit(n, "conv", n.inputs, n.outputs, **spatial, groups=groups)


def _gemm(r: Translation, n: OnnxNode) -> None:
    """alpha A B + beta C; with constant B a linear layer."""
    a, b, c = n.inputs[0], n.inputs[1], n.inputs[2] if len(n.inputs) > 2 else ""
    alpha, beta = n.attributes.get("alpha", 1.0), n.attributes.get("beta", 1.0)
    if n.attributes.get("transA", 0):
        a = r.emit(n, "transpose", [a], axes=(1, 0))
    weight, bias = r.known(b), r.known(c)
    if weight is not None and weight.ndim != 2:
        raise ValueError(f"Gemm {n.name!r}: got a matrix of shape {weight.shape}")
    per_output = bias is not None and bias.size == (bias.shape[-1] if bias.ndim else 1)
    if weight is not None and (not c or per_output):
        out_in = weight if n.attributes.get("transB", 0) else weight.T
        if bias is not None and bias.size not in (1, out_in.shape[0]):
            raise ValueError(f"Gemm {n.name!r}: got bias {bias.shape}, matrix {out_in.T.shape}")
        if alpha != 1 or not n.attributes.get("transB", 0):
            b = r.constant(n, "weight", alpha * out_in, weight.dtype)
        if bias is not None and (beta != 1 or bias.shape != out_in.shape[:1]):
            full = np.broadcast_to(beta * bias.reshape(-1), out_in.shape[:1])
            c = r.constant(n, "bias", full, bias.dtype)
        r.emit(n, "linear", [a, b, c], n.outputs)
        return
    if n.attributes.get("transB", 0):
        b = r.emit(n, "transpose", [b], axes=(1, 0))
    last = n.outputs
    product = r.emit(n, "matmul", [a, b], last if alpha == 1 and not c else None)
    if alpha != 1:
        scale = r.constant(n, "alpha", alpha, np.float32)
        product = r.emit(n, "mul", [product, scale], None if c else last)
    if c:
        if beta != 1:
            c = r.emit(n, "mul", [c, r.constant(n, "beta", beta, np.float32)])
        r.emit(n, "add", [product, c], last)


def _matmul(r: Translation, n: OnnxNode) -> None:
    weight = r.known(n.inputs[1])
    if weight is not None and weight.ndim == 2 and weight.dtype.kind == "f":
        r.emit(n, "linear", [n.inputs[0], r.constant(n, "weight", weight.T)], n.outputs)
    else:
        r.emit(n, "matmul", n.inputs, n.outputs)


def _batch_norm(r: Translation, n: OnnxNode) -> None:
    """A product and a sum, which folding puts into the layer before."""
    if n.attributes.get("training_mode", 0) or len([o for o in n.outputs if o]) > 1:
        raise Unsupported("training mode")
    gamma, beta, mean, variance = (r.number(n, i).astype(np.float64) for i in range(1, 5))
    variance = variance + n.attributes.get("epsilon", 1e-5)
    if not (variance > 0).all():
        raise ValueError(f"BatchNormalization {n.name!r}: a variance is not positive")
    scale = gamma / np.sqrt(variance)
    rank = r.rank(n.inputs[0]) or 4
    channel = (-1,) + (1,) * (rank - 2)
    x = r.emit(n, "mul", [n.inputs[0], r.constant(n, "scale", scale.reshape(channel), np.float32)])
    shift = (beta - mean * scale).reshape(channel)
    r.emit(n, "add", [x, r.constant(n, "shift", shift, np.float32)], n.outputs)


def _layer_norm(r: Translation, n: OnnxNode) -> None:
    if r.from_end(n.inputs[0], n.attributes.get("axis", -1)) != -1:
        raise Unsupported("an axis that is not the last")
    if len([o for o in n.outputs if o]) > 1:
        raise Unsupported("more than one output")
    r.emit(n, "layer_norm", n.inputs, n.outputs, eps=n.attributes.get("epsilon", 1e-5))


def _rms_norm(r: Translation, n: OnnxNode) -> None:
    if r.from_end(n.inputs[0], n.attributes.get("axis", -1)) != -1:
        raise Unsupported("an axis that is not the last")
    r.emit(n, "rms_norm", n.inputs, n.outputs, eps=n.attributes.get("epsilon", 1e-5))


def _softmax(r: Translation, n: OnnxNode) -> None:
    old = r.model.opset < 13
    axis = r.from_end(n.inputs[0], n.attributes.get("axis", 1 if old else -1))
    if not old or axis == -1:
        r.emit(n, "softmax", n.inputs, n.outputs, axis=axis)
        return
    # Before opset 13 all axes from this one on are one.
    shape = r.emit(n, "shape", n.inputs)
    matrix = r.emit(n, "flatten", n.inputs, axis=axis)
    r.emit(n, "reshape", [r.emit(n, "softmax", [matrix], axis=-1), shape], n.outputs)


def _clip(r: Translation, n: OnnxNode) -> None:
    bounds = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        value = n.attributes[name] if name in n.attributes else r.number(n, index, default)
        bounds.append(float(np.asarray(value).reshape(())))
    r.emit(n, "clip", n.inputs[:1], n.outputs, low=bounds[0], high=bounds[1])


def _several(op: str) -> Callable[[Translation, OnnxNode], None]:
    """An operator of any number of inputs, from one of two."""

    def translate(r: Translation, n: OnnxNode) -> None:
        if len(n.inputs) == 1:
            r.same(n.outputs[0], n.inputs[0])
            return
        so_far = n.inputs[0]
        for name in n.inputs[1:-1]:
            so_far = r.emit(n, op, [so_far, name])
        r.emit(n, op, [so_far, n.inputs[-1]], n.outputs)

    return translate


def _reduce(op: str) -> Callable[[Translation, OnnxNode], None]:
    def translate(r: Translation, n: OnnxNode) -> None:
        axes = r.integers(n, 1, "axes")
        if not axes and n.attributes.get("noop_with_empty_axes", 0):
            r.same(n.outputs[0], n.inputs[0])
            return
        if axes:
            axes = tuple(r.from_end(n.inputs[0], axis) for axis in axes)
        keep = bool(n.attributes.get("keepdims", 1))
        r.emit(n, op, n.inputs[:1], n.outputs, axes=axes or None, keep=keep)

    return translate


def _global_pool(op: str) -> Callable[[Translation, OnnxNode], None]:
    def translate(r: Translation, n: OnnxNode) -> None:
        rank = r.rank(n.inputs[0])
        if rank is None:
            raise Unsupported("an input of unknown rank")
        r.emit(n, op, n.inputs, n.outputs, axes=tuple(range(2 - rank, 0)), keep=True)

    return translate


def _pool(r: Translation, n: OnnxNode) -> None:
    kernel = tuple(n.attributes["kernel_shape"])
    options: dict[str, Any] = {"kernel": kernel, **_spatial(r, n, kernel)}
    options["ceil"] = bool(n.attributes.get("ceil_mode", 0))
    if len([o for o in n.outputs if o]) > 1:
        raise Unsupported("more than one output")
    if n.op == "AveragePool":
        if any(step != 1 for step in options.pop("dilation")):
            raise Unsupported("dilations")
        options["count_padding"] = bool(n.attributes.get("count_include_pad", 0))
        r.emit(n, "avg_pool", n.inputs, n.outputs, **options)
    else:
        r.emit(n, "max_pool", n.inputs, n.outputs, **options)


def _reshape(r: Translation, n: OnnxNode) -> None:
    if n.attributes.get("allowzero", 0) and 0 in r.number(n, 1):
        raise Unsupported("allowzero")
    r.emit(n, "reshape", n.inputs, n.outputs)


def _transpose(r: Translation, n: OnnxNode) -> None:
    axes = n.attributes.get("perm")
    if axes is None:
        rank = r.rank(n.inputs[0])
        if rank is None:
            raise Unsupported("no perm, and an input of unknown rank")
        axes = range(rank)[::-1]
    r.emit(n, "transpose", n.inputs, n.outputs, axes=tuple(axes))


def _squeeze(r: Translation, n: OnnxNode) -> None:
    axes = r.integers(n, 1, "axes")
    if axes is None:
        raise Unsupported("no axes")
    r.emit(n, n.op.lower(), n.inputs[:1], n.outputs, axes=axes)


def _slice(r: Translation, n: OnnxNode) -> None:
    axes: tuple[int, ...] | None
    steps: tuple[int, ...] | None = None
    if "starts" in n.attributes:
        starts, ends = (r.constant(n, k, n.attributes[k], np.int64) for k in ("starts", "ends"))
        axes = tuple(n.attributes.get("axes", range(len(n.attributes["starts"]))))
    else:
        starts, ends = (r.long(n, name) for name in n.inputs[1:3])
        axes, steps = r.integers(n, 3, ""), r.integers(n, 4, "")
        if axes is None:
            value = r.known(starts)
            if value is None:
                raise Unsupported("no axes, and starts that are no constant")
            axes = tuple(range(value.size))
    steps = steps or (1,) * len(axes)
    r.emit(n, "slice", [n.inputs[0], starts, ends], n.outputs, axes=axes, steps=steps)


def _split(r: Translation, n: OnnxNode) -> None:
    sizes = r.integers(n, 1, "split")
    parts = None if sizes else n.attributes.get("num_outputs", len(n.outputs))
    axis = n.attributes.get("axis", 0)
    r.emit(n, "split", n.inputs[:1], n.outputs, axis=axis, sizes=sizes, parts=parts)


def _pad(r: Translation, n: OnnxNode) -> None:
    if len(n.inputs) > 3 and n.inputs[3]:
        raise Unsupported("axes")
    mode = n.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise Unsupported(f"mode {mode}")
    if "pads" in n.attributes:
        amounts = r.constant(n, "pads", n.attributes["pads"], np.int64)
    else:
        amounts = n.inputs[1]
    value = float(np.asarray(r.number(n, 2, n.attributes.get("value", 0.0))).reshape(()))
    mode = {"edge": "replicate"}.get(mode, mode)
    r.emit(n, "pad", [n.inputs[0], amounts], n.outputs, mode=mode, value=value)


def _gather(r: Translation, n: OnnxNode) -> None:
    table, axis = r.known(n.inputs[0]), n.attributes.get("axis", 0)
    if table is not None and table.ndim == 2 and axis == 0 and table.dtype.kind == "f":
        r.emit(n, "embedding", [n.inputs[1], n.inputs[0]], n.outputs)
    else:
        r.emit(n, "gather", n.inputs, n.outputs, axis=axis)


def _resize(r: Translation, n: OnnxNode) -> None:
    a = n.attributes
    mode = a.get("mode", "nearest")
    how = a.get("coordinate_transformation_mode", "half_pixel")
    if r.model.opset < 11:
        how = "asymmetric"
    places = {"nearest": ["asymmetric"], "linear": ["half_pixel", "align_corners"]}
    nearest = a.get("nearest_mode", "floor" if r.model.opset < 11 else "round_prefer_floor")
    if how not in places.get(mode, []) or (mode == "nearest" and nearest != "floor"):
        raise Unsupported(f"mode {mode}, {how}, {nearest}")
    if a.get("antialias", 0) or "axes" in a:
        raise Unsupported("antialias or axes")
    scales = r.number(n, 1 if r.model.opset < 11 else 2, a.get("scales"))
    options: dict[str, Any] = {"mode": mode, "align_corners": how == "align_corners"}
    if scales is not None and len(scales):
        if any(scale != 1 for scale in scales[:2]):
            raise Unsupported("scales of the batch or of channels")
        if how == "align_corners" and any(scale % 1 for scale in scales):
            raise Unsupported("align_corners at scales that are no whole numbers")
        options["scales"] = tuple(float(scale) for scale in scales[2:])
        r.emit(n, "resize", n.inputs[:1], n.outputs, **options)
    else:
        bounds = [r.constant(n, "axis", [i], np.int64) for i in (2, _END)]
        size = r.emit(n, "slice", [n.inputs[3], *bounds], axes=(0,), steps=(1,))
        r.emit(n, "resize", [n.inputs[0], size], n.outputs, **options)


def _cast(r: Translation, n: OnnxNode) -> None:
    r.emit(n, "cast", n.inputs[:1], n.outputs, dtype=dtype_name(n.attributes["to"]))


def _fill(r: Translation, n: OnnxNode) -> None:
    value = np.asarray(n.attributes.get("value", np.zeros(1, np.float32)))
    r.emit(n, "fill", n.inputs, n.outputs, value=value.item(), dtype=str(value.dtype))


def _shape(r: Translation, n: OnnxNode) -> None:
    begin, end = n.attributes.get("start", 0), n.attributes.get("end", _END)
    if begin == 0 and end == _END:
        r.emit(n, "shape", n.inputs, n.outputs)
        return
    bounds = [r.constant(n, "bound", [i], np.int64) for i in (begin, end)]
    whole = r.emit(n, "shape", n.inputs)
    r.emit(n, "slice", [whole, *bounds], n.outputs, axes=(0,), steps=(1,))


def _lstm(r: Translation, n: OnnxNode) -> None:
    a = n.attributes
    standard = a.get("activations", ["Sigmoid", "Tanh", "Tanh"])
    if any(name not in ("Sigmoid", "Tanh") for name in standard):
        raise Unsupported(f"activations {standard}")
    if any(a.get(key, 0) for key in ("clip", "input_forget", "layout")):
        raise Unsupported("clip, input_forget or layout")
    named = [*n.inputs, *[""] * 8]
    if named[4] or named[7]:
        raise Unsupported("sequence_lens or peepholes")
    w, u, d = r.number(n, 1), r.number(n, 2), a["hidden_size"]
    b = r.number(n, 3)
    outputs = [*n.outputs, "", "", ""][:3]
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    made: list[list[str]] = []
    for i, reverse in enumerate(directions[a.get("direction", "forward")]):
        # ONNX orders the gates input, output, forget, cell; torch input, forget, cell, output.
        order = np.r_[0:d, 2 * d : 3 * d, 3 * d : 4 * d, d : 2 * d]
        weight = r.constant(n, "weight", w[i][order])
        recurrent = r.constant(n, "recurrent", u[i][order])
        bias = ""
        if b is not None:
            bias = r.constant(n, "bias", (b[i][: 4 * d] + b[i][4 * d :])[order])
        at = r.constant(n, "direction", i, np.int64)
        states = [r.emit(n, "gather", [s, at], axis=0) if s else "" for s in named[5:7]]
        results = [r.fresh(f"{n.outputs[0] or n.name}.{part}") for part in ("y", "h", "c")]
        r.emit(n, "lstm", [n.inputs[0], weight, recurrent, bias, *states], results, reverse=reverse)
        made.append(results)
    for part, output, axis in zip(range(3), outputs, (1, 0, 0), strict=True):
        if output:
            apart = [r.emit(n, "unsqueeze", [m[part]], axes=(axis,)) for m in made]
            r.emit(n, "concat", apart, [output], axis=axis)


_SAME_NAME = (
    *("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs"),
    *("Floor", "Ceil", "Sin", "Cos", "Add", "Sub", "Mul", "Div", "Pow"),
    *("Equal", "Less", "Greater", "Where", "Expand", "Tile"),
)
TRANSLATE: Mapping[str, Callable[[Translation, OnnxNode], object]] = {
    **{name: _direct(name.lower()) for name in _SAME_NAME},
    "Not": _direct("logical_not"),
    "And": _direct("logical_and"),
    "Or": _direct("logical_or"),
    "Max": _several("maximum"),
    "Min": _several("minimum"),
    "Sum": _several("add"),
    "Range": _direct("arange"),
    "Identity": _identity,
    "Dropout": _dropout,
    "Constant": _constant,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "LSTM": _lstm,
    "Softmax": _softmax,
    "Clip": _clip,
    "Gelu": lambda r, n: r.emit(
        n, "gelu", n.inputs, n.outputs, tanh=n.attributes.get("approximate", "none") == "tanh"
    ),
    "HardSigmoid": lambda r, n: r.emit(
        n,
        "hard_sigmoid",
        n.inputs,
        n.outputs,
        alpha=n.attributes.get("alpha", 0.2),
        beta=n.attributes.get("beta", 0.5),
    ),
    "HardSwish": _direct("hard_swish"),
    "LeakyRelu": lambda r, n: r.emit(
        n, "leaky_relu", n.inputs, n.outputs, alpha=n.attributes.get("alpha", 0.01)
    ),
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool("mean"),
    "GlobalMaxPool": _global_pool("amax"),
    "ReduceMean": _reduce("mean"),
    "ReduceSum": _reduce("sum"),
    "ReduceMax": _reduce("amax"),
    "ReduceMin": _reduce("amin"),
    "Reshape": _reshape,
    "Flatten": lambda r, n: r.emit(
        n, "flatten", n.inputs, n.outputs, axis=n.attributes.get("axis", 1)
    ),
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Slice": _slice,
    "Concat": lambda r, n: r.emit(n, "concat", n.inputs, n.outputs, axis=n.attributes["axis"]),
    "Split": _split,
    "Pad": _pad,
    "Gather": _gather,
    "Resize": _resize,
    "Upsample": _resize,
    "Cast": _cast,
    "Shape": _shape,
    "ConstantOfShape": _fill,
}
