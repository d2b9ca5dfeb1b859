"""The operators of the Hamming regulariser on a CUDA device: launches of the Triton kernels.

`lhr` imports this module when the first CUDA tensor arrives, so that nobody else waits for Triton.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from quernstone.kernels.triton import pim as kernels

BLOCK = 2048
WARPS = 8
# An option of the compiler, whose default is about to change: positions are products and sums with
# two roundings each, as on the CPU.
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


def _arguments(
    weight: Tensor, scales: Tensor, group: int, bits: int, shift: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    if not bool(((scales > 0) & torch.isfinite(1 / scales) & torch.isfinite(scales)).all()):
        raise ValueError(
            "scales: got a number that is not finite and positive, or so small that its inverse is "
            "not, expected none"
        )
    rows = weight.shape[0] if weight.ndim else 1
    stride = 0 if scales.shape[0] == 1 else scales.shape[1]
    sizes = (weight.numel(), weight.numel() // rows, group, stride, shift)
    return sizes, {"BITS": bits, "SINGLE": scales.numel() == 1, "BLOCK": BLOCK, **_OPTIONS}


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def hamming_mean(weight: Tensor, scales: Tensor, group: int, bits: int, shift: int) -> Tensor:
    sizes, options = _arguments(weight, scales, group, bits, shift)
    weight = weight.contiguous()
    programs = triton.cdiv(weight.numel(), BLOCK)
    partials = weight.new_empty(programs)
    with _on(weight):
        kernels._lhr_fwd_kernel[(programs,)](weight, scales, partials, *sizes, **options)
    return (partials.sum(dtype=torch.float64) / weight.numel()).float()


def hamming_mean_backward(
    dmean: Tensor, weight: Tensor, scales: Tensor, group: int, bits: int, shift: int
) -> Tensor:
    sizes, options = _arguments(weight, scales, group, bits, shift)
    weight = weight.contiguous()
    grad = torch.empty_like(weight)
    programs = triton.cdiv(weight.numel(), BLOCK)
    with _on(weight):
        kernels._lhr_bwd_kernel[(programs,)](
            weight, scales, dmean.contiguous(), grad, *sizes, **options
        )
    return grad
