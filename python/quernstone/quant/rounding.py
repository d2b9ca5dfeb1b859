"""From numbers to codes: scales, rounding with a penalty, and GPTQ's order of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quernstone import _core
from quernstone.quant.scheme import Scheme
from quernstone.quant.tensor import QTensor, by_scale, undo_by_scale

Method = Literal["rtn", "gptq"]
PenaltyUnit = Literal["step", "output"]
# The smallest scale, of a group of zeros too: products with codes stay normal numbers.
SMALLEST_SCALE = 2.0**-100
# The largest weight: scales of any kind, times any code, stay finite in fp32.
LARGEST_WEIGHT = 2.0**125
MAX_CLIPS = 1000


@dataclass(frozen=True)
class Rounding:
    """To the code whose squared error plus penalty is least.

    Without a penalty this is rounding to the nearest code.

    Args:
        penalty: what each code costs: [levels], from the scheme's lowest code to its highest.
        reach: codes on either side of the nearest that may be taken; 0 without a penalty.
        unit: of penalty and error. "step": steps of the scale, squared, so a penalty of 1 outweighs
            being one step away. "output": the squared error that the Hessian gives, dw H dw^T; with
            "gptq" alone, where a step of input i costs (scale / U_ii)^2 for H^-1 = U^T U.
    """

    penalty: Tensor | None = None
    reach: int = 1
    unit: PenaltyUnit = "step"

    def __post_init__(self) -> None:
        if self.unit not in ("step", "output"):
            raise ValueError(f"unit: got {self.unit!r}, expected 'step' or 'output'")
        if self.reach < 0:
            raise ValueError(f"reach: got {self.reach}, expected 0 or more")
        if self.penalty is None:
            return
        if not isinstance(self.penalty, Tensor):
            raise TypeError(f"penalty: got {type(self.penalty).__name__}, expected a Tensor")
        if bool(self.penalty.isnan().any()):
            raise ValueError("penalty: got NaN, expected numbers")

    def codes(self, x: Tensor, scheme: Scheme) -> Tensor:
        """Codes, as floats, of the positions `x` among the codes: value / scale + zero point."""
        nearest = x.round().clamp_(scheme.lowest, scheme.highest)
        if self.penalty is None:
            return nearest
        levels = scheme.highest - scheme.lowest + 1
        if self.penalty.shape != (levels,):
            raise ValueError(
                f"penalty.shape: got {tuple(self.penalty.shape)}, expected {(levels,)}"
            )
        table = self.penalty.to(x)
        best = nearest
        cost = torch.full_like(x, torch.inf)
        # From the nearest outwards, so that it wins where costs are equal.
        for step in sorted(range(-self.reach, self.reach + 1), key=abs):
            code = (nearest + step).clamp_(scheme.lowest, scheme.highest)
            here = (code - x).square() + table[(code - scheme.lowest).long()]
            better = here < cost
            best, cost = torch.where(better, code, best), torch.where(better, here, cost)
        return best


NEAREST = Rounding()


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    method: Method = "rtn",
    hessian: Tensor | None = None,
    rounding: Rounding = NEAREST,
    clips: int = 1,
    damping: float = 0.01,
) -> QTensor:
    """Quantises a tensor.

    Axes: n channels (first axis), k numbers of a channel.

    Args:
        weight: [n, ...] floating point, up to 2^125; for "gptq" [n, k], outputs by inputs.
        scheme: bits, granularity, kind of scale.
        method: "rtn" rounds every number by itself. "gptq" rounds the inputs of a matrix one
            after the other and corrects those to come for the error so far.
        hessian: [k, k] of the layer's squared error, 2/N sum x x^T over inputs x
            (`quernstone.sensitivity.layer_hessian`); "gptq" only.
        rounding: which code a number gets; a penalty makes some codes dearer.
        clips: how many scales to try for each group, from the one that covers every number down
            to about half of it; the one of the least squared error is taken. 1 clips nothing.
        damping: share of the mean diagonal that is added to the Hessian's.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: GPTQ, arXiv 2210.17323, algorithm 1, without reordering of the inputs.
    """
    _check(weight, scheme, method, hessian, rounding, clips, damping)
    with torch.no_grad():
        if method == "rtn" or not weight.numel():
            return _round_all(weight.float(), scheme, rounding, clips)
        assert hessian is not None
        return _gptq(weight, scheme, hessian, rounding, clips, damping)


def _check(
    weight: Tensor,
    scheme: Scheme,
    method: str,
    hessian: Tensor | None,
    rounding: Rounding,
    clips: int,
    damping: float,
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a Tensor")
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme: got {type(scheme).__name__}, expected a Scheme")
    if not weight.is_floating_point():
        raise TypeError(f"weight.dtype: got {weight.dtype}, expected a floating-point dtype")
    if weight.device.type != "cpu":
        raise ValueError(f"weight.device: got {weight.device}, expected cpu")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: got a number that is not finite, expected finite numbers")
    if _largest(weight) > LARGEST_WEIGHT:
        raise ValueError("weight: got a number above 2^125, expected none")
    if not isinstance(rounding, Rounding):
        raise TypeError(f"rounding: got {type(rounding).__name__}, expected a Rounding")
    if method not in ("rtn", "gptq"):
        raise ValueError(f"method: got {method!r}, expected 'rtn' or 'gptq'")
    if rounding.unit == "output" and (method != "gptq" or clips > 1):
        raise ValueError(
            f"rounding.unit: got 'output' with method {method!r} and {clips} clips, expected "
            "'gptq' and 1 clip"
        )
    if not 1 <= clips <= MAX_CLIPS:
        raise ValueError(f"clips: got {clips}, expected 1 to {MAX_CLIPS}")
    if not 0.0 <= damping <= 1.0:
        raise ValueError(f"damping: got {damping}, expected 0 to 1")
    if (hessian is None) != (method == "rtn"):
        raise ValueError(
            f"hessian: got {'none' if hessian is None else 'one'} with method {method!r}, "
            "expected one with 'gptq' alone"
        )
    if hessian is None:
        return
    if weight.ndim != 2:
        raise ValueError(f"weight.ndim: got {weight.ndim}, expected 2 with method 'gptq'")
    inputs = weight.shape[1]
    if not isinstance(hessian, Tensor):
        raise TypeError(f"hessian: got {type(hessian).__name__}, expected a Tensor")
    if not hessian.is_floating_point():
        raise TypeError(f"hessian.dtype: got {hessian.dtype}, expected a floating-point dtype")
    if hessian.shape != (inputs, inputs):
        raise ValueError(f"hessian.shape: got {tuple(hessian.shape)}, expected {(inputs, inputs)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian: got a number that is not finite, expected finite numbers")
    # Sums of products in another order differ by rounding, no more.
    if not torch.allclose(hessian, hessian.T, rtol=1e-3, atol=1e-3 * _largest(hessian)):
        raise ValueError("hessian: got a matrix that is not symmetric, expected one that is")


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _round_all(weight: Tensor, scheme: Scheme, rounding: Rounding, clips: int) -> QTensor:
    grouped = by_scale(weight, scheme)
    scales, zeros = choose_scales(grouped, scheme, rounding, clips)
    codes = _codes(grouped, scales, zeros, scheme, rounding)
    return QTensor.from_codes(
        undo_by_scale(codes, scheme, tuple(weight.shape)).to(torch.int16),
        scales,
        None if zeros is None else zeros.to(torch.uint8),
        scheme=scheme,
    )


def _codes(
    x: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, rounding: Rounding
) -> Tensor:
    position = x / scales.unsqueeze(-1)
    if zeros is not None:
        position = position + zeros.unsqueeze(-1)
    return rounding.codes(position, scheme)


def choose_scales(
    grouped: Tensor, scheme: Scheme, rounding: Rounding = NEAREST, clips: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points, each [n, g], of numbers [n, g, numbers of a group]."""
    if not grouped.shape[-1]:
        table = grouped.new_full(grouped.shape[:-1], SMALLEST_SCALE)
        return table, None if scheme.symmetric else torch.zeros_like(table)
    if scheme.symmetric:
        low = high = None
        steps = scheme.levels / 2 - (0.5 if scheme.full_range else 1.0)
        widest = grouped.abs().amax(-1) / steps
    else:
        low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
        widest = (high - low) / (scheme.levels - 1)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    for clip in range(clips):
        scales = representable(widest * (1.0 - 0.5 * clip / clips), scheme)
        zeros = None
        if low is not None:
            zeros = (-low / scales).round_().clamp_(0, scheme.highest)
        if clips == 1:
            return scales, zeros
        codes = _codes(grouped, scales, zeros, scheme, rounding)
        value = (codes if zeros is None else codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
        error = (value - grouped).square().sum(-1)
        if best is None:
            best, least = (scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better, scales, best[0]),
            None if zeros is None or best[1] is None else torch.where(better, zeros, best[1]),
        )
    assert best is not None
    return best


def representable(scales: Tensor, scheme: Scheme) -> Tensor:
    """The nearest scale that the scheme can hold; for powers of two, nearest in the logarithm."""
    scales = scales.clamp(min=SMALLEST_SCALE)
    if scheme.scale == "fp32":
        return scales
    if scheme.scale == "bf16":
        return scales.to(torch.bfloat16).float()
    if scheme.scale == "power-of-two":
        return scales.log2().round_().exp2_()
    return _two_shift(scales)


def _two_shift(scales: Tensor) -> Tensor:
    """2^a, or 2^a + 2^b with b from a - 8 to a: the nearest."""
    base = scales.log2().floor_().exp2_()
    rest = scales - base
    below = rest.clamp(min=SMALLEST_SCALE).log2().floor_().exp2_()
    candidates = [torch.zeros_like(base), below, 2 * below]
    candidates = [torch.where(c >= base / 256, c, 0.0) for c in candidates]
    errors = torch.stack([(c - rest).abs() for c in candidates])
    pick = errors.argmin(0, keepdim=True)
    return base + torch.stack(candidates).gather(0, pick).squeeze(0)


def _gptq(
    weight: Tensor,
    scheme: Scheme,
    hessian: Tensor,
    rounding: Rounding,
    clips: int,
    damping: float,
) -> QTensor:
    outputs, inputs = weight.shape
    w = weight.double().clone()
    upper = inverse_factor(hessian, damping)
    if scheme.granularity != "group":
        table = [choose_scales(by_scale(w.float(), scheme), scheme, rounding, clips)]
        codes = _round_with(w, upper, *table[0], scheme, rounding)
    else:
        table = []
        codes = torch.empty(outputs, inputs, dtype=torch.int16)
        for begin in range(0, inputs, scheme.group):
            end = min(begin + scheme.group, inputs)
            # Groups see what the inputs before them have left behind.
            group = w[:, begin:end]
            table.append(choose_scales(group.float().unsqueeze(1), scheme, rounding, clips))
            codes[:, begin:end] = _round_with(
                group, upper[begin:end, begin:end], *table[-1], scheme, rounding
            )
            w[:, end:] -= group @ upper[begin:end, end:]
    zero_points = [zeros.to(torch.uint8) for _, zeros in table if zeros is not None]
    return QTensor.from_codes(
        codes,
        torch.cat([scales for scales, _ in table], 1),
        torch.cat(zero_points, 1) if zero_points else None,
        scheme=scheme,
    )


def _round_with(
    w: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: Scheme,
    rounding: Rounding,
) -> Tensor:
    """Codes [n, k] of one scale a row, or one in all; `w` becomes the errors."""
    rows = len(w)
    scale = scales[:, 0].double().expand(rows)
    zero = torch.zeros_like(scale) if zeros is None else zeros[:, 0].double().expand(rows)
    levels = (scheme.lowest, scheme.highest)
    return round_columns(w[None], upper[None], scale[None], zero[None], *levels, rounding)[0]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U [..., k, k], fp64, of (H + damping)^-1 = U^T U for Hessians [..., k, k].

    An input that was never seen cannot be corrected for: it is rounded by itself.

    Raises:
        ValueError: a matrix that is not positive definite.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    unseen = diagonal <= 0
    diagonal[unseen] = 1.0
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(h)
    # The inverse of a matrix that is nearly singular may have no factor although the matrix has.
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed.any()) or bool(failed_too.any()):
        raise ValueError(
            "hessian: got a matrix that is not positive definite after damping, expected one "
            "that is; more calibration data or a larger damping"
        )
    found: Tensor = upper.contiguous()
    return found


# What later blocks owe to one of these is one product.
_BLOCK = 128


def round_columns(
    w: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor,
    lowest: int,
    highest: int,
    rounding: Rounding,
) -> Tensor:
    """Codes [g, n, k], int16, of matrices whose inputs are rounded one after the other.

    Args:
        w: [g, n, k] fp64, numbers; they become the errors that GPTQ passes on, each over U_ii.
        upper: [g, k, k] fp64 of `inverse_factor`.
        scale, zero: [g, n] fp64; a code of the number 0 need not be whole.
        lowest, highest: the codes.
        rounding: its penalty has a number for each code.
    """
    levels = highest - lowest + 1
    penalty, reach = rounding.penalty, rounding.reach
    if penalty is None:
        penalty, reach = torch.zeros(levels), 0
    if penalty.shape != (levels,):
        raise ValueError(f"penalty.shape: got {tuple(penalty.shape)}, expected {(levels,)}")
    costs = penalty.detach().double().contiguous().numpy()
    codes = torch.empty(w.shape, dtype=torch.int16)
    inputs = w.shape[-1]
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        block = w[..., begin:end]
        _core.round_columns(
            block.numpy(),
            upper[:, begin:end, begin:end].numpy(),
            scale.numpy(),
            zero.numpy(),
            costs,
            lowest,
            reach,
            rounding.unit == "output",
            codes[..., begin:end].numpy(),
        )
        w[..., end:] -= block @ upper[:, begin:end, end:]
    return codes
