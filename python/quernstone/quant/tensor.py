"""A quantised tensor: packed codes, scales and zero points of a scheme."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quernstone import _core
from quernstone.quant.scheme import MAX_BITS, MIN_BITS, Scheme


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes of `scheme.bits` bits one after the other in bytes, with their scales.

    Axes: n channels (the first axis of `shape`), k numbers of a channel, g groups of a channel.

    Args:
        scheme: how the codes are to be read.
        shape: of the tensor that was quantised.
        packed: [bytes] uint8, codes minus `scheme.lowest`, row by row, the lowest bit first.
        scales: [n, g] fp32; g is 1 unless the granularity is "group", n is 1 for "tensor".
        zero_points: as scales, uint8; None with a symmetric scheme.

    Raises:
        ValueError, TypeError: a part has another dtype or size than scheme and shape imply, or a
            scale is not finite and positive or none of the scheme's kind, or a code or a zero point
            is not one of its codes.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    def __post_init__(self) -> None:
        expect(self.packed, "packed", torch.uint8, (packed_bytes(self.numel, self.scheme.bits),))
        table = scale_shape(self.scheme, self.shape)
        expect(self.scales, "scales", torch.float32, table)
        if not bool(torch.isfinite(self.scales).all()) or not bool((self.scales > 0).all()):
            raise ValueError("scales: got a number that is not finite and positive, expected none")
        if not bool(can_hold(self.scheme, self.scales).all()):
            raise ValueError(
                f"scales: got a number that {self.scheme.scale!r} does not hold, expected none"
            )
        spare = self.scheme.highest - self.scheme.lowest + 1
        if spare < self.scheme.levels and self.numel:
            most = int(unpack_bits(self.packed, self.scheme.bits, self.numel).max())
            if most == spare:
                raise ValueError(
                    f"packed: got the code {most + self.scheme.lowest}, expected at most "
                    f"{self.scheme.highest}"
                )
        if self.scheme.symmetric:
            if self.zero_points is not None:
                raise ValueError("zero_points: got some, expected None with a symmetric scheme")
        else:
            if self.zero_points is None:
                raise ValueError("zero_points: got None, expected some with an asymmetric scheme")
            expect(self.zero_points, "zero_points", torch.uint8, table)
            if self.zero_points.numel() and int(self.zero_points.max()) > self.scheme.highest:
                raise ValueError(
                    f"zero_points: got {int(self.zero_points.max())}, expected 0 to "
                    f"{self.scheme.highest}"
                )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales (2 for bf16, 1 for powers of two, else 4) and zero points."""
        per_scale = {"fp32": 4, "bf16": 2, "two-shift": 2, "power-of-two": 1}[self.scheme.scale]
        zeros = 0 if self.zero_points is None else self.zero_points.numel()
        return self.packed.numel() + per_scale * self.scales.numel() + zeros

    def codes(self) -> Tensor:
        """The codes as int16, in `shape`: `scheme.lowest` to `scheme.highest`."""
        raw = unpack_bits(self.packed, self.scheme.bits, self.numel)
        return raw.to(torch.int16).add_(self.scheme.lowest).view(self.shape)

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, fp32, in `shape`."""
        code = by_scale(self.codes().float(), self.scheme)
        if self.zero_points is not None:
            code = code - self.zero_points.float().unsqueeze(-1)
        value = code * self.scales.unsqueeze(-1)
        return undo_by_scale(value, self.scheme, self.shape)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None = None,
        *,
        scheme: Scheme,
    ) -> QTensor:
        """A quantised tensor of integer codes.

        Raises:
            ValueError: a code is not one of the scheme's, or as the constructor.
        """
        if codes.is_floating_point():
            raise TypeError(f"codes: got {codes.dtype}, expected an integer dtype")
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < scheme.lowest or high > scheme.highest:
                raise ValueError(
                    f"codes: got {low} to {high}, expected {scheme.lowest} to {scheme.highest}"
                )
        raw = (codes.to(torch.int16) - scheme.lowest).to(torch.uint8).flatten()
        packed = pack_bits(raw, scheme.bits)
        return cls(scheme, tuple(codes.shape), packed, scales, zero_points)


def expect(x: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises where a part of a tensor is not as it has to be."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a Tensor")
    if x.dtype != dtype:
        raise TypeError(f"{name}.dtype: got {x.dtype}, expected {dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name}.device: got {x.device}, expected cpu")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}.shape: got {tuple(x.shape)}, expected {shape}")


def can_hold(scheme: Scheme, scales: Tensor) -> Tensor:
    """Whether each finite, positive scale is one of the scheme's kind."""
    if scheme.scale == "fp32":
        return torch.ones_like(scales, dtype=torch.bool)
    if scheme.scale == "bf16":
        return scales == scales.bfloat16().float()
    # Of 2^a (1 + f), f is 0 or, with two shifts, 2^-8 to 1/2.
    rest = 2.0 * scales.frexp().mantissa - 1.0
    if scheme.scale == "power-of-two":
        return rest == 0.0
    return (rest == 0.0) | ((rest.frexp().mantissa == 0.5) & (rest >= 2.0**-8))


def groups_of(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, groups of a channel, and numbers of a group, of a tensor of this shape."""
    numel = math.prod(shape)
    if scheme.granularity == "tensor" or not shape:
        return 1, 1, numel
    channels = shape[0]
    width = numel // channels if channels else 0
    if scheme.granularity == "channel":
        return channels, 1, width
    return channels, -(-width // scheme.group), scheme.group


def scale_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    channels, groups, _ = groups_of(scheme, shape)
    return channels, groups


def by_scale(x: Tensor, scheme: Scheme) -> Tensor:
    """[n, g, numbers of a group]; a short last group is filled up with zeros."""
    channels, groups, width = groups_of(scheme, tuple(x.shape))
    rows = x.reshape(channels, -1) if channels else x.reshape(0, 0)
    missing = groups * width - rows.shape[1]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.view(channels, groups, width)


def undo_by_scale(x: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    channels = x.shape[0]
    width = math.prod(shape) // channels if channels else 0
    return x.reshape(channels, x.shape[1] * x.shape[2])[:, :width].reshape(shape)


def packed_bytes(codes: int, bits: int) -> int:
    return (codes * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [count] uint8 as bytes, the lowest bit first; the last byte ends in zeros."""
    _check_bits(bits)
    expect(codes, "codes", torch.uint8, (codes.numel(),))
    packed = torch.empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8)
    _core.pack_bits(codes.contiguous().numpy(), bits, packed.numpy())
    return packed


def _check_bits(bits: int) -> None:
    # Before anything is sized by them.
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits: got {bits}, expected {MIN_BITS} to {MAX_BITS}")


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` unsigned codes that `pack_bits` packed."""
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"count: got {count}, expected 0 or more")
    expect(packed, "packed", torch.uint8, (packed_bytes(count, bits),))
    codes = torch.empty(count, dtype=torch.uint8)
    _core.unpack_bits(packed.contiguous().numpy(), bits, codes.numpy())
    return codes
