"""The Hamming regulariser: how many ones trained weights will have once they are integers.

Axes: n channels (first axis), k weights of a channel (the others), g groups of a channel.

A code's Hamming weight is interpolated linearly between integers, so it has a slope almost
everywhere. The operators `quernstone::hamming_mean` and `..._backward` carry it through autograd;
`hamming_regulariser_into` writes value and gradient in one call, without autograd's memory.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from quernstone import _core
from quernstone.quant.rounding import SMALLEST_SCALE

MIN_BITS, MAX_BITS = 2, 16
Granularity = Literal["tensor", "channel", "group"]


def mean_hamming_weight(
    weight: Tensor, scales: Tensor, *, bits: int = 8, shift: int = 0, group: int = 0
) -> Tensor:
    """The mean interpolated Hamming weight of a layer, differentiable in its weights.

        HW(floor x) + (x - floor x) (HW(floor x + 1) - HW(floor x)),   x = weight / scale + shift

    x is clipped to the codes of `bits` bits, beyond which the slope is 0. At an integer (within
    2^(bits-22) of one, which is what fp32 leaves of code x scale / scale) the slope is the mean of
    those on both sides. Scales are constants: they get no gradient.

    Args:
        weight: [n, ...] fp32, with at least one number.
        scales: fp32, finite and positive: one for all, [n] or [n, 1] one a channel, or [n, g] one
            for each `group` neighbours of a channel.
        bits: of a signed two's complement code, 2 to 16.
        shift: added to the codes before they are stored, as by weight-distribution shifts.
        group: weights that share a scale; 0 unless scales are [n, g], a last group may be shorter.

    Returns:
        [] fp32, in bits: 0 to `bits`. NaN where a weight is.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: AIM (arXiv 2511.04321), our reading of its regulariser. Oracles: finite differences,
    `int.bit_count`, `reference_lhr` in fp64.
    """
    table, group = _table(weight, scales, bits, shift, group)
    mean: Tensor = hamming_mean(weight, table, group, bits, shift)
    return mean


def hamming_regulariser(
    weight: Tensor, scales: Tensor, *, bits: int = 8, shift: int = 0, group: int = 0
) -> Tensor:
    """The square of `mean_hamming_weight`: layers with many ones pay more.

    Args, Returns, Raises: see `mean_hamming_weight`; in bits squared.

    Source: AIM (arXiv 2511.04321), our reading: the loss of a network adds lambda times the sum of
    this over its layers.
    """
    return mean_hamming_weight(weight, scales, bits=bits, shift=shift, group=group).square()


def hamming_regulariser_into(
    weight: Tensor,
    scales: Tensor,
    grad: Tensor,
    *,
    factor: float = 1.0,
    accumulate: bool = True,
    bits: int = 8,
    shift: int = 0,
    group: int = 0,
) -> float:
    """Value and gradient of factor x `hamming_regulariser`, the gradient into existing memory.

    Args:
        weight: contiguous, on the CPU; otherwise as the others, see `mean_hamming_weight`.
        grad: contiguous fp32 in the shape of `weight`, such as `weight.grad`; not its memory.
        factor: finite.
        accumulate: adds to `grad` instead of overwriting it.

    Returns:
        factor x mean^2.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    if not isinstance(grad, Tensor):
        raise TypeError(f"grad: got {type(grad).__name__}, expected a Tensor")
    table, group = _table(weight, scales, bits, shift, group)
    for name, x in (("weight", weight), ("grad", grad)):
        if x.device.type != "cpu":
            raise ValueError(f"{name}.device: got {x.device}, expected cpu")
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()}, expected a contiguous tensor")
    if grad.dtype != torch.float32:
        raise TypeError(f"grad.dtype: got {grad.dtype}, expected torch.float32")
    if grad.shape != weight.shape:
        raise ValueError(f"grad.shape: got {tuple(grad.shape)}, expected {tuple(weight.shape)}")
    if abs(weight.data_ptr() - grad.data_ptr()) < weight.nbytes:
        raise ValueError("grad: got memory of the weight, expected its own")
    if not abs(float(factor)) < float("inf"):
        raise ValueError(f"factor: got {factor}, expected a finite number")
    value: float = hamming_squared_into(
        weight.detach(), table, group, bits, shift, float(factor), accumulate, grad.detach()
    ).item()
    return value


def symmetric_scales(
    weight: Tensor, *, bits: int = 8, granularity: Granularity = "channel", group: int = 0
) -> Tensor:
    """Scales that cover the largest magnitudes with 2^(bits-1) - 1 steps, as `quant.Scheme` does.

    Args:
        weight: [n, ...] floating point, with at least one number.
        bits: 2 to 16.
        granularity: what shares a scale: "tensor", "channel" or "group".
        group: neighbours that share one; 0 unless the granularity is "group".

    Returns:
        [1, 1], [n, 1] or [n, g] fp32, at least 2^-100.

    Raises:
        ValueError, TypeError: an argument is not as described, or a weight is not finite.
    """
    _check_weight(weight)
    _integer("bits", bits, MIN_BITS, MAX_BITS)
    if granularity not in ("tensor", "channel", "group"):
        raise ValueError(f"granularity: got {granularity!r}, expected 'tensor', 'channel', 'group'")
    if (granularity == "group") != (group > 0):
        raise ValueError(
            f"group: got {group} with granularity {granularity!r}, expected a positive "
            "number with 'group' and 0 otherwise"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: got a number that is not finite, expected finite numbers")
    rows = _rows(weight.detach()).float().abs()
    if granularity == "tensor":
        rows = rows.reshape(1, -1)
    if granularity == "group":
        missing = -rows.shape[1] % group
        rows = torch.nn.functional.pad(rows, (0, missing)).reshape(rows.shape[0], -1, group)
    widest: Tensor = rows.amax(-1) / (2 ** (bits - 1) - 1)
    return widest.reshape(len(rows), -1).clamp(min=SMALLEST_SCALE)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] if x.ndim else 1, -1)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a Tensor")
    if not weight.is_floating_point():
        raise TypeError(f"weight.dtype: got {weight.dtype}, expected a floating-point dtype")
    if not weight.numel():
        raise ValueError(f"weight.shape: got {tuple(weight.shape)}, expected at least one number")


def _integer(name: str, value: int, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name}: got {number}, expected {least} to {most}")
    return number


def _table(weight: Tensor, scales: Tensor, bits: int, shift: int, group: int) -> tuple[Tensor, int]:
    """The scales as [n or 1, g], and the weights of a channel that share one."""
    _check_weight(weight)
    if weight.dtype != torch.float32:
        raise TypeError(f"weight.dtype: got {weight.dtype}, expected torch.float32")
    _integer("bits", bits, MIN_BITS, MAX_BITS)
    most = (1 << (bits - 1)) - 1
    _integer("shift", shift, -most, most)
    if not isinstance(scales, Tensor):
        raise TypeError(f"scales: got {type(scales).__name__}, expected a Tensor")
    if scales.dtype != torch.float32:
        raise TypeError(f"scales.dtype: got {scales.dtype}, expected torch.float32")
    if scales.device != weight.device:
        raise ValueError(f"scales.device: got {scales.device}, expected {weight.device}")
    channels = weight.shape[0] if weight.ndim else 1
    width = weight.numel() // channels
    _integer("group", group, 0, width)
    groups = -(-width // group) if group else 1
    if (
        scales.ndim > 2
        or (scales.numel() != 1 and scales.shape[:1] != (channels,))
        or (
            scales.numel()
            not in ((1,) if not group and scales.numel() == 1 else (channels * groups,))
        )
    ):
        wanted = f"({channels}, {groups})" if group else f"one number, ({channels},) or "
        wanted += "" if group else f"({channels}, 1)"
        raise ValueError(f"scales.shape: got {tuple(scales.shape)}, expected {wanted}")
    table = scales.detach().reshape(-1, groups).contiguous()
    return table, group or width


# Operators ----------------------------------------------------------------------------------------

_library = torch.library.Library("quernstone", "FRAGMENT")
_library.define(
    "hamming_mean(Tensor weight, Tensor scales, int group, int bits, int shift) -> Tensor"
)
_library.define(
    "hamming_mean_backward(Tensor dmean, Tensor weight, Tensor scales, int group, int bits, "
    "int shift) -> Tensor"
)
_library.define(
    "hamming_squared_into(Tensor weight, Tensor scales, int group, int bits, int shift, "
    "float factor, bool accumulate, Tensor(a!) grad) -> Tensor"
)


def _mean(weight: Tensor, scales: Tensor, group: int, bits: int, shift: int) -> Tensor:
    rows = _rows(weight).contiguous()
    mean = _core.pim.lhr_mean(rows.numpy(), scales.numpy(), group, bits, shift)
    return torch.tensor(mean, dtype=torch.float32)


def _mean_backward(
    dmean: Tensor, weight: Tensor, scales: Tensor, group: int, bits: int, shift: int
) -> Tensor:
    grad = torch.empty(weight.shape, dtype=torch.float32)
    rows = _rows(weight).contiguous()
    _core.pim.lhr_gradient(
        *(rows.numpy(), scales.numpy(), group, bits, shift, float(dmean), False),
        _rows(grad).numpy(),
    )
    return grad


def _squared_into(
    weight: Tensor,
    scales: Tensor,
    group: int,
    bits: int,
    shift: int,
    factor: float,
    accumulate: bool,
    grad: Tensor,
) -> Tensor:
    value = _core.pim.lhr_squared(
        *(_rows(weight).numpy(), scales.numpy(), group, bits, shift, factor, accumulate),
        _rows(grad).numpy(),
    )
    return torch.tensor(value, dtype=torch.float64)


def _on_cuda(name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        from quernstone.pim import lhr_triton

        return getattr(lhr_triton, name)(*arguments)

    return kernel


for _name, _kernel in (
    ("hamming_mean", _mean),
    ("hamming_mean_backward", _mean_backward),
    ("hamming_squared_into", _squared_into),
):
    _library.impl(_name, _kernel, "CPU")
for _name in ("hamming_mean", "hamming_mean_backward"):
    _library.impl(_name, _on_cuda(_name), "CUDA")


def _mean_fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(())


def _mean_backward_fake(_dmean: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _squared_into_fake(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((), dtype=torch.float64)


torch.library.register_fake("quernstone::hamming_mean", _mean_fake)
torch.library.register_fake("quernstone::hamming_mean_backward", _mean_backward_fake)
torch.library.register_fake("quernstone::hamming_squared_into", _squared_into_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scales, *ctx.options = inputs
    ctx.save_for_backward(weight, scales)


def _backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales = ctx.saved_tensors
    return hamming_mean_backward(dmean, weight, scales, *ctx.options), None, None, None, None


def _no_second_gradient(ctx: Any, *_: Tensor) -> NoReturn:
    raise NotImplementedError(
        "mean_hamming_weight: the gradient of its gradient is not implemented; "
        "call backward() or grad() without create_graph=True"
    )


torch.library.register_autograd("quernstone::hamming_mean", _backward, setup_context=_save)
torch.library.register_autograd("quernstone::hamming_mean_backward", _no_second_gradient)

hamming_mean = torch.ops.quernstone.hamming_mean.default
hamming_mean_backward = torch.ops.quernstone.hamming_mean_backward.default
hamming_squared_into = torch.ops.quernstone.hamming_squared_into.default
