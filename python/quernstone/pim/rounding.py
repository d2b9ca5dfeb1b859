"""Rounding to integers of few ones, with the error that the layer's inputs make of it.

Axes: g groups, n outputs, k inputs.

A row w of a layer with inputs x becomes integers q that are stored with a shift, at a scale s, so
that

    E[(sum_i (w_i - s (q_i - shift)) x_i)^2] + price ones(q)

is small. GPTQ takes the inputs one after the other: each gets the code of least cost, near or far,
and those to come are corrected for its error. Codes are those that the bits hold, so that nothing
is cut when the shift is added: what does not fit is an error like others and corrected for.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from quernstone.pim import checks
from quernstone.pim.macro import MAX_BITS
from quernstone.quant import Rounding
from quernstone.quant.rounding import inverse_factor, round_columns

DAMPING = 0.01
REACH = 24


def hamming_rounding(price: float, *, bits: int = 8, reach: int = REACH) -> Rounding:
    """A rounding for `quernstone.quant`, by which every stored one costs a price.

    Args:
        price: of a one, 0 or more, in the squared error of the layer's output that the Hessian
            gives.
        bits: of a code, 2 to 8 with `quantize`, up to 16 here.
        reach: codes on either side of the nearest that may be taken.

    Returns:
        For `quantize(..., method="gptq")` with a symmetric scheme of the full range.

    Raises:
        ValueError, TypeError: an argument out of its range.

    Source: the penalty is our post-training form of AIM's Hamming regulariser; GPTQ is
    arXiv 2210.17323.
    """
    if not (math.isfinite(price) and price >= 0):
        raise ValueError(f"price: got {price}, expected 0 or more")
    return Rounding(price * _ones(checks.bits("bits", bits)), reach, unit="output")


@functools.cache
def _ones(bits: int) -> Tensor:
    """Of each code, from the lowest."""
    low, high = checks.span(bits, signed=True)
    codes = np.arange(low, high + 1, dtype=np.int64) & ((1 << bits) - 1)
    return torch.from_numpy(np.bitwise_count(codes).astype(np.float64))


def hamming_round(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    *,
    price: float,
    shift: int = 0,
    bits: int = 8,
    reach: int = REACH,
    damping: float = DAMPING,
) -> Tensor:
    """Integers of few ones for matrices whose inputs are known by their second moments.

    Args:
        weight: [g, n, k] or [n, k], floating point.
        hessian: [g, k, k] or [k, k], proportional to E[x x^T].
        scale: [g, n] or [n], above 0: the number between neighbouring integers.
        price: of a one, in squared output error as the Hessian measures it; 0 is plain GPTQ.
        shift: added to every integer before it is stored.
        bits: that each is stored in, 2 to 16.
        reach: codes on either side of the nearest that may be taken.
        damping: share of the mean diagonal that is added to the Hessian's.

    Returns:
        int16 in the shape of the weight: stored, so that scale (stored - shift) is near the weight.

    Raises:
        ValueError, TypeError: an argument that is not as described.

    Oracle: all codes, for a few weights; `quernstone.quant` without shift and price.
    """
    matrix = weight.ndim == 2
    if matrix:
        weight, hessian, scale = weight[None], hessian[None], scale[None]
    _check(weight, hessian, scale, shift, bits)
    upper = ordered_factor(hessian, damping)
    stored = round_ordered(
        weight.double(), hessian, upper, scale.double(), price=price, shift=shift, bits=bits,
        reach=reach,
    )  # fmt: skip
    return stored[0] if matrix else stored


def ordered_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The factor that `round_ordered` takes, of Hessians [g, k, k]."""
    return inverse_factor(_in_order(hessian), damping)


def round_ordered(
    weight: Tensor,
    hessian: Tensor,
    upper: Tensor,
    scale: Tensor,
    *,
    price: float,
    shift: int,
    bits: int,
    reach: int = REACH,
) -> Tensor:
    """`hamming_round` of [g, n, k] in fp64 with `ordered_factor` at hand, unchecked."""
    order = _order(hessian)
    index = order[:, None].expand(weight.shape)
    low, high = checks.span(bits, signed=True)
    codes = round_columns(
        weight.gather(2, index),
        upper,
        scale.contiguous(),
        torch.full_like(scale, float(shift)),
        low,
        high,
        hamming_rounding(price, bits=bits, reach=reach),
    )
    return torch.empty_like(codes).scatter_(2, index, codes)


def _order(hessian: Tensor) -> Tensor:
    """The inputs [g, k], the strongest first: their errors are corrected for by the others."""
    strength = hessian.diagonal(dim1=-2, dim2=-1)
    return torch.argsort(strength, dim=-1, descending=True, stable=True)


def _in_order(hessian: Tensor) -> Tensor:
    order = _order(hessian)
    rows = hessian.gather(1, order[:, :, None].expand(hessian.shape))
    return rows.gather(2, order[:, None].expand(hessian.shape))


def _check(weight: Tensor, hessian: Tensor, scale: Tensor, shift: int, bits: int) -> None:
    if checks.bits("bits", bits) < 2:
        raise ValueError(f"bits: got {bits}, expected 2 to {MAX_BITS}")
    low, high = checks.span(bits, signed=True)
    if not low <= shift <= high:
        raise ValueError(f"shift: got {shift}, expected {low} to {high} ({bits} bits)")
    if weight.ndim != 3:
        raise ValueError(f"weight.ndim: got {weight.ndim}, expected 2 or 3")
    g, n, k = weight.shape
    for name, x, shape in (
        ("weight", weight, (g, n, k)),
        ("hessian", hessian, (g, k, k)),
        ("scale", scale, (g, n)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name}.shape: got {tuple(x.shape)}, expected {shape}")
        if not x.is_floating_point():
            raise TypeError(f"{name}.dtype: got {x.dtype}, expected a floating-point dtype")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: got a number that is not finite, expected finite numbers")
    if not bool((scale > 0).all()):
        raise ValueError("scale: got a number that is not positive, expected none")
