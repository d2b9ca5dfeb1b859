"""What the nodes of a graph compute, in plain torch.

The signature of a function is the schema of its op: positional parameters are the inputs by their
roles ("weight", "bias", ...), keyword-only parameters the attributes. Everything differentiates.

Axes: b batch, c channels, h heads, t queries or steps, s keys, d head or state width.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Padding = Sequence[tuple[int, int]]
"""Elements before and after, for each spatial axis."""

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_MAX_POOL: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVG_POOL: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_CONV_TRANSPOSE = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


# Layers -------------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """x [b, c, ...], weight [out, c / groups, ...], bias [out]; padded with zeros."""
    around = [before for before, _ in padding]
    if any(before != after for before, after in padding):
        x, around = functional.pad(x, _flat(padding)), [0] * len(padding)
    run: Any = _CONV[len(stride) - 1]
    out: Tensor = run(x, weight, bias, stride, around, dilation, groups)
    return out


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int = 1,
    output_padding: Sequence[int],
) -> Tensor:
    """x [b, c, ...], weight [c, out / groups, ...], bias [out]; the padding is cut off."""
    run: Any = _CONV_TRANSPOSE[len(stride) - 1]
    before = [first for first, _ in padding]
    # Cuts `before` on both sides; what the far side differs by is cut or kept here.
    more = [
        first - last + extra for (first, last), extra in zip(padding, output_padding, strict=True)
    ]
    grown = [max(extra, 0) for extra in more]
    out: Tensor = run(x, weight, bias, stride, before, grown, groups, dilation)
    for axis, extra in enumerate(more):
        if extra < 0:
            out = out.narrow(2 + axis, 0, out.shape[2 + axis] + extra)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., c], weight [out, c], bias [out]."""
    return functional.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two activations, batched over leading axes."""
    return a @ b


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [rows, c] by ids [...]; a negative id counts from the end."""
    return functional.embedding(torch.where(ids < 0, ids + weight.shape[0], ids).long(), weight)


def lstm(
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction over x [t, b, c]: outputs [t, b, d], last hidden and cell state [b, d].

    weight [4 d, c] and recurrent [4 d, d] hold the gates input, forget, cell, output, as in torch;
    bias [4 d] is the sum of both biases; a state that is absent begins at zero.
    """
    d = recurrent.shape[1]
    zero = x.new_zeros(x.shape[1], d)
    state = (zero if hidden is None else hidden, zero if cell is None else cell)
    weights = [weight, recurrent]
    if bias is not None:
        weights += [bias, torch.zeros_like(bias)]
    out, last, memory = torch.lstm(
        x.flip(0) if reverse else x,
        tuple(part.unsqueeze(0).contiguous() for part in state),
        weights,
        bias is not None,
        1,
        0.0,
        False,
        False,
        False,
    )
    return (out.flip(0) if reverse else out), last.squeeze(0), memory.squeeze(0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v over q [b, h, t, d], k [b, h, s, d] and v [b, h, s, d].

    The mask broadcasts to the logits. With `causal`, query i sees keys j <= i + s - t.
    """
    logits = scale * (q @ k.transpose(-1, -2))
    if mask is not None:
        logits = logits + mask
    if causal:
        t, s = logits.shape[-2:]
        later = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(s - t + 1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.softmax(-1) @ v


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """Mean 0 and variance 1 over the last axis, then weight [c] and bias [c]."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last axis, times weight [c]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary(x: Tensor, *, base: float) -> Tensor:
    """Rotates the pairs (i, i + d/2) of x [..., t, d] by t base^(-2 i / d). arXiv 2104.09864."""
    t, half = x.shape[-2], x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.arange(t, dtype=torch.float32, device=x.device)[:, None] * rate
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# Activations --------------------------------------------------------------------------------------


def gelu(x: Tensor, *, tanh: bool = False) -> Tensor:
    return functional.gelu(x, approximate="tanh" if tanh else "none")


def silu(x: Tensor) -> Tensor:
    return functional.silu(x)


def hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return functional.hardswish(x)


def leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    return functional.leaky_relu(x, alpha)


def clip(x: Tensor, *, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def softmax(x: Tensor, *, axis: int) -> Tensor:
    return x.softmax(axis)


# Element by element -------------------------------------------------------------------------------


def div(a: Tensor, b: Tensor) -> Tensor:
    """Whole numbers are cut towards zero."""
    whole = not (a.is_floating_point() or b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def cast(x: Tensor, *, dtype: str) -> Tensor:
    return x.to(getattr(torch, dtype))


# Pooling ------------------------------------------------------------------------------------------


def max_pool(
    x: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    ceil: bool = False,
) -> Tensor:
    """The greatest element of each window of x [b, c, ...]; padding never is."""
    over = _overhang(x, kernel, stride, padding, dilation, ceil)
    x = functional.pad(x, _flat(_longer(padding, over)), value=-math.inf)
    out: Tensor = _MAX_POOL[len(kernel) - 1](x, kernel, stride, 0, dilation)
    return out


def avg_pool(
    x: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    ceil: bool = False,
    count_padding: bool = False,
) -> Tensor:
    """The mean of each window of x [b, c, ...], over its elements or with the padding's zeros."""
    run = _AVG_POOL[len(kernel) - 1]
    over = _overhang(x, kernel, stride, padding, [1] * len(kernel), ceil)
    counted = functional.pad(torch.ones_like(x[:1, :1]), _flat(padding), value=float(count_padding))
    counted = functional.pad(counted, _flat([(0, more) for more in over]))
    x = functional.pad(x, _flat(_longer(padding, over)))
    out: Tensor = run(x, kernel, stride) / run(counted, kernel, stride)
    return out


def mean(x: Tensor, *, axes: Sequence[int] | None = None, keep: bool = True) -> Tensor:
    return x.mean(_axes(x, axes), keepdim=keep)


def sum_(x: Tensor, *, axes: Sequence[int] | None = None, keep: bool = True) -> Tensor:
    return x.sum(_axes(x, axes), keepdim=keep)


def amax(x: Tensor, *, axes: Sequence[int] | None = None, keep: bool = True) -> Tensor:
    return x.amax(_axes(x, axes), keepdim=keep)


def amin(x: Tensor, *, axes: Sequence[int] | None = None, keep: bool = True) -> Tensor:
    return x.amin(_axes(x, axes), keepdim=keep)


# Structure ----------------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """The shape is whole numbers: 0 is x's own extent, -1 what remains."""
    wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]
    return x.reshape(wanted)


def flatten(x: Tensor, *, axis: int) -> Tensor:
    """A matrix; the axes before `axis` become rows."""
    rows = math.prod(x.shape[: axis + x.ndim if axis < 0 else axis])
    return x.reshape(rows, -1)


def transpose(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    return x.permute(*axes)


def squeeze(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        if x.shape[axis] != 1:
            raise ValueError(f"axis {axis} has {x.shape[axis]} elements, expected 1")
    return x.squeeze(tuple(axes))


def unsqueeze(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    """Axes of one element at these places of the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def slice_(
    x: Tensor, starts: Tensor, ends: Tensor, *, axes: Sequence[int], steps: Sequence[int]
) -> Tensor:
    """Python's slices along some axes; a step may be negative."""
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps, strict=True):
        taken = range(x.shape[axis])[start:end:step]
        if step == 1:
            x = x.narrow(axis, taken.start, len(taken))
        else:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.long, device=x.device))
    return x


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def split(
    x: Tensor, *, axis: int, sizes: Sequence[int] | None = None, parts: int | None = None
) -> tuple[Tensor, ...]:
    """Parts of these sizes, or this many of one size, of which the last may be smaller."""
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // (parts or 1)), axis)
    return torch.split(x, list(sizes), axis)


def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast with a shape, in which 1 leaves an extent as it is."""
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


def tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.tile(repeats.tolist())


def pad(x: Tensor, amounts: Tensor, *, mode: str = "constant", value: float = 0.0) -> Tensor:
    """amounts: elements before each axis, then elements after each axis."""
    rank = x.ndim
    before, after = amounts.tolist()[:rank], amounts.tolist()[rank:]
    if mode == "constant":
        return functional.pad(x, _flat(list(zip(before, after, strict=True))), value=value)
    # torch pads the last axes of a tensor with leading axes; one axis after the other does all.
    for axis, sides in enumerate(zip(before, after, strict=True)):
        if any(sides):
            last = x.movedim(axis, -1)
            flat = functional.pad(last.reshape(1, -1, last.shape[-1]), sides, mode=mode)
            x = flat.reshape(*last.shape[:-1], -1).movedim(-1, axis)
    return x


def gather(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Elements along an axis, which the axes of `indices` replace."""
    axis %= x.ndim
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).long().reshape(-1)
    out = x.index_select(axis, flat)
    return out.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def resize(
    x: Tensor,
    size: Tensor | None = None,
    *,
    scales: Sequence[float] | None = None,
    mode: str,
    align_corners: bool = False,
) -> Tensor:
    """x [b, c, ...] at a size or at scales; "nearest" takes floor(i / scale), "linear" is of degree
    one along every axis."""
    kind = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.ndim - 2] if mode == "linear" else mode
    return functional.interpolate(
        x,
        None if size is None else size.tolist(),
        None if scales is None else list(scales),
        mode=kind,
        align_corners=align_corners if mode == "linear" else None,
    )


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def fill(shape: Tensor, *, value: float, dtype: str) -> Tensor:
    return torch.full(shape.tolist(), value, dtype=getattr(torch, dtype))


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


# --------------------------------------------------------------------------------------------------


def _flat(padding: Padding) -> list[int]:
    """As torch's pad takes it: the last axis first."""
    return [amount for sides in reversed(padding) for amount in sides]


def _axes(x: Tensor, axes: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if axes is None else tuple(axes)


def _overhang(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    ceil: bool,
) -> list[int]:
    """How far the last window reaches beyond the padding, for each spatial axis."""
    over = []
    for axis, (before, after) in enumerate(padding):
        extent = x.shape[2 + axis]
        room = extent + before + after - dilation[axis] * (kernel[axis] - 1) - 1
        steps = -(-room // stride[axis])
        # A window begins on an element or in the padding before it.
        if steps * stride[axis] >= extent + before:
            steps -= 1
        over.append(max(0, steps * stride[axis] - room) if ceil else 0)
    return over


def _longer(padding: Padding, over: Sequence[int]) -> Padding:
    return [(before, after + more) for (before, after), more in zip(padding, over, strict=True)]


def _unary(function: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        out: Tensor = function(x)
        return out

    return run


def _binary(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = function(a, b)
        return out

    return run


_UNARY = (
    *("relu", "sigmoid", "tanh", "erf", "exp", "log", "sqrt", "reciprocal", "neg", "abs"),
    *("floor", "ceil", "sin", "cos", "logical_not"),
)
_BINARY = (
    *("add", "sub", "mul", "pow", "maximum", "minimum"),
    *("equal", "less", "greater", "logical_and", "logical_or"),
)
_NAMED = {"equal": "eq"}  # torch.equal compares whole tensors.

OPS: dict[str, Callable[..., Any]] = {
    function.__name__.rstrip("_"): function
    for function in (
        *(conv, conv_transpose, linear, matmul, embedding, lstm, attention),
        *(layer_norm, rms_norm, rotary),
        *(gelu, silu, hard_sigmoid, hard_swish, leaky_relu, clip, softmax),
        *(div, cast, where),
        *(max_pool, avg_pool, mean, sum_, amax, amin),
        *(reshape, flatten, transpose, squeeze, unsqueeze, slice_, concat, split, expand, tile),
        *(pad, gather, resize, shape, fill, arange),
    )
}
"""The function of each op, by its name."""
OPS |= {name: _unary(getattr(torch, name)) for name in _UNARY}
OPS |= {name: _binary(getattr(torch, _NAMED.get(name, name))) for name in _BINARY}


@dataclass(frozen=True)
class Schema:
    """What a node of an op has."""

    roles: tuple[str, ...]
    """Names of the inputs; the last one stands for any number where `variadic`."""
    needed: int
    """Inputs that are never absent."""
    variadic: bool
    attributes: dict[str, bool]
    """Names of the attributes, and whether they are needed."""


@cache
def schema(op: str) -> Schema:
    """The schema of an op of `OPS`."""
    parameters = inspect.signature(OPS[op]).parameters.values()
    inputs = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inputs)
    return Schema(
        tuple(p.name for p in inputs),
        sum(p.default is p.empty for p in inputs),
        variadic,
        {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY},
    )


def evaluate(
    op: str, inputs: Sequence[Tensor | None], attributes: Mapping[str, Any]
) -> list[Tensor]:
    """The outputs of one node; an optional input that is absent is None."""
    out = OPS[op](*inputs, **attributes)
    return list(out) if isinstance(out, tuple) else [out]
