"""Packed matrices and their numbers, for the tests of products and of experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quernstone import _core
from quernstone.quant import Scheme, quantize


@dataclass(frozen=True)
class Form:
    """A format of weights, as its layout takes it."""

    format: str
    group: int = 0
    zero_points: bool = False

    def __str__(self) -> str:
        return f"{self.format}{f'-g{self.group}' if self.group else ''}{'-z' * self.zero_points}"

    @property
    def computes(self) -> tuple[str, ...]:
        return ("float",) if self.format == "bf16" else ("float", "int8")


FORMS = (
    Form("bf16"),
    Form("int8"),
    Form("int4", 32),
    Form("int4", 32, True),
    Form("int4", 64),
    Form("int4", 128, True),
)


def aligned(size: int) -> NDArray[np.uint8]:
    """Bytes at a multiple of 64, all ones: what is not written shows."""
    memory = np.full(size + 64, 0xFF, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


def packed(
    form: Form, weights: torch.Tensor
) -> tuple[_core.Layout, NDArray[np.uint8], NDArray[np.float64]]:
    """Layout, bytes, and the numbers that they stand for by the quantiser's own account."""
    rows, inputs = weights.shape
    layout = _core.Layout(form.format, rows, inputs, form.group, form.zero_points)
    out = aligned(layout.bytes)
    if form.format == "bf16":
        bits = weights.bfloat16()
        _core.pack_bf16(layout, bits.view(torch.int16).numpy().view(np.uint16), out)
        return layout, out, bits.double().numpy()
    if form.format == "int8":
        made = quantize(weights, Scheme(8))
        _core.pack_codes(
            layout, made.codes().to(torch.int8).numpy(), made.scales.numpy(), None, out
        )
    else:
        scheme = Scheme(4, not form.zero_points, "group", form.group, "bf16")
        made = quantize(weights, scheme)
        zeros = None if made.zero_points is None else made.zero_points.numpy()
        codes = made.codes() + (0 if form.zero_points else 8)
        _core.pack_codes(layout, codes.to(torch.int8).numpy(), made.scales.numpy(), zeros, out)
    return layout, out, made.dequantize().double().numpy()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_int8_groups(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Activations as the int8 products see them: groups of 32, the largest at 127."""
    tokens, inputs = x.shape
    wide = np.zeros((tokens, -(-inputs // 32) * 32))
    wide[:, :inputs] = x
    groups = wide.reshape(tokens, -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(top == 0, 1.0, top / 127)
    return (np.rint(groups / scale) * scale).reshape(tokens, -1)[:, :inputs]
