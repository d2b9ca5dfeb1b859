"""The Hamming regulariser as plain as torch can say it, in fp64; never on the fast path.

Axes: n channels (first axis), k weights of a channel, g groups of a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ones(code: Tensor, bits: int) -> Tensor:
    """Ones of integers (as floats) in two's complement, fp64."""
    stored = code.long() & ((1 << bits) - 1)
    return sum(((stored >> b) & 1).double() for b in range(bits))  # type: ignore[return-value]


def margin(bits: int) -> float:
    """Positions this close to an integer count as that integer."""
    return 2.0 ** (bits - 22)


def positions(weight: Tensor, scales: Tensor, group: int, shift: int) -> Tensor:
    """weight / scale + shift, [n, k], fp64; scales are [n or 1, g]."""
    rows = weight.double().reshape(weight.shape[0] if weight.ndim else 1, -1)
    spread = scales.double().repeat_interleave(group, dim=1)[:, : rows.shape[1]]
    return rows / spread + shift


def interpolated(position: Tensor, bits: int) -> Tensor:
    """HW at a real position: linear between the integers, constant beyond the codes."""
    high = 2.0 ** (bits - 1) - 1
    x = position.clamp(-high - 1, high)
    below = x.floor()
    at, following = ones(below, bits), ones(below + 1, bits)
    return at + (x - below) * (following - at)


def slope(position: Tensor, bits: int) -> Tensor:
    """d HW / d position; at an integer the mean of the slopes on both sides."""
    high = 2.0 ** (bits - 1) - 1
    below = (position - margin(bits)).floor()
    above = (position + margin(bits)).floor() + 1
    ends = [ones(end.clamp(-high - 1, high), bits) for end in (below, above)]
    return (ends[1] - ends[0]) / (above - below)


class _Interpolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, position: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(position)
        ctx.bits = bits  # type: ignore[attr-defined]
        return interpolated(position, bits)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (position,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * slope(position, ctx.bits), None  # type: ignore[attr-defined]


def mean_hamming_weight(
    weight: Tensor, scales: Tensor, group: int, bits: int = 8, shift: int = 0
) -> Tensor:
    """The mean of the interpolated Hamming weights in bits, fp64, differentiable in `weight`.

    Source: AIM (arXiv 2511.04321), our reading of its regulariser; the sub-gradient at integers is
    ours.
    """
    position = positions(weight, scales, group, shift)
    made: Tensor = _Interpolated.apply(position, bits)  # type: ignore[no-untyped-call]
    return made.mean()
