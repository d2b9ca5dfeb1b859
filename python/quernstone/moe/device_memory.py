"""What the two kinds of GPU kernels ask of their arguments, and how numbers get to a device.

Axes: a assignments sorted by expert, p experts that have some, t tokens, m hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.moe.experts import ExpertsShape


def to_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """A copy that nobody waits for, from memory that torch keeps until it has been read."""
    here = torch.from_numpy(numbers)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def check_tensors(
    shape: ExpertsShape,
    data: Tensor,
    counts: Sequence[int],
    tokens: Tensor,
    x: Tensor,
    dtype: torch.dtype,
) -> None:
    """That the tensors are of the dtypes, shapes and device that a call has.

    Raises:
        ValueError, TypeError: one is not.
    """
    for name, value, want, ndim in (
        ("data", data, torch.uint8, 1),
        ("tokens", tokens, torch.int32, 1),
        ("x", x, dtype, 2),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
        if value.dtype is not want:
            raise TypeError(f"{name}.dtype: got {value.dtype}, expected {want}")
        if value.ndim != ndim:
            raise ValueError(f"{name}.ndim: got {value.ndim}, expected {ndim}")
        if not value.is_contiguous():
            raise ValueError(f"{name}: got strides {value.stride()}, expected one run of memory")
        if value.device != x.device:
            raise ValueError(f"{name}.device: got {value.device}, expected {x.device} as of x")
    if x.shape[1] != shape.hidden:
        raise ValueError(f"x.shape[1]: got {x.shape[1]}, expected {shape.hidden}")
    if len(tokens) != sum(counts):
        raise ValueError(f"tokens: got {len(tokens)}, expected {sum(counts)}, the sum of counts")


def check_places(
    shape: ExpertsShape, data: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """That the experts lie within `data`, as the kernels read them, and each has a token.

    Raises:
        ValueError: they do not.
    """
    if len(offsets) != len(counts):
        raise ValueError(f"offsets: got {len(offsets)}, expected {len(counts)}, one a count")
    if data.data_ptr() % 64:
        raise ValueError("data: got memory that is not aligned, expected 64 bytes")
    last = data.numel() - shape.expert_bytes
    for offset, count in zip(offsets, counts, strict=True):
        if offset % 64 or not 0 <= offset <= last:
            raise ValueError(f"offsets: got {offset}, expected a multiple of 64 from 0 to {last}")
        if count < 1:
            raise ValueError(f"counts: got {count}, expected 1 or more")
