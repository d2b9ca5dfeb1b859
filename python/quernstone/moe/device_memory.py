"""What a call of the GPU kernels is given, and how numbers get to a device.

Axes: a assignments (a token at one of its experts) sorted by expert, p experts that have some,
t tokens, m hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.moe.experts import ExpertsShape


class Batch:
    """Assignments of a call sorted by expert, on the host: checked once, then copied to a device.

    Args:
        shape: of the experts; its count is not used.
        data: uint8 on the device, in which packed experts lie, at an address divisible by 64.
        offsets: [p] bytes from its beginning to each expert, multiples of 64.
        counts: [p] assignments of each, 1 or more.
        tokens: [a] rows of x, by expert and assignment.
        x: [t, m] on the device, contiguous.
        dtype: that x has to have.

    Raises:
        ValueError: a shape, an offset, a count or a token that does not fit.
        TypeError: a tensor of another dtype.
    """

    def __init__(
        self,
        shape: ExpertsShape,
        data: Tensor,
        offsets: Sequence[int],
        counts: Sequence[int],
        tokens: NDArray[Any],
        x: Tensor,
        dtype: torch.dtype,
    ) -> None:
        for name, value, want, ndim in (("data", data, torch.uint8, 1), ("x", x, dtype, 2)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
            if value.dtype is not want:
                raise TypeError(f"{name}.dtype: got {value.dtype}, expected {want}")
            if value.ndim != ndim:
                raise ValueError(f"{name}.ndim: got {value.ndim}, expected {ndim}")
            if not value.is_contiguous():
                raise ValueError(f"{name}: got strides {value.stride()}, expected one run")
        if data.device != x.device:
            raise ValueError(f"data.device: got {data.device}, expected {x.device} as of x")
        if x.shape[1] != shape.hidden:
            raise ValueError(f"x.shape[1]: got {x.shape[1]}, expected {shape.hidden}")
        if data.data_ptr() % 64:
            raise ValueError("data: got memory that is not aligned, expected 64 bytes")
        if len(offsets) != len(counts):
            raise ValueError(f"offsets: got {len(offsets)}, expected {len(counts)}, one a count")
        last = data.numel() - shape.expert_bytes
        for offset, count in zip(offsets, counts, strict=True):
            if offset % 64 or not 0 <= offset <= last:
                raise ValueError(
                    f"offsets: got {offset}, expected a multiple of 64 from 0 to {last}"
                )
            if count < 1:
                raise ValueError(f"counts: got {count}, expected 1 or more")
        if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
            got = tokens.dtype if isinstance(tokens, np.ndarray) else type(tokens).__name__
            raise TypeError(f"tokens: got {got}, expected an array of integers")
        if tokens.shape != (sum(counts),):
            raise ValueError(
                f"tokens.shape: got {tokens.shape}, expected {(sum(counts),)}, the sum of counts"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(x):
            raise ValueError(
                f"tokens: got {tokens.min()} to {tokens.max()}, expected 0 to {len(x) - 1}"
            )
        self.offsets = np.asarray(offsets, np.int64)
        self.counts = np.asarray(counts, np.int64)
        self.tokens = tokens.astype(np.int32)

    @property
    def begins(self) -> NDArray[np.int32]:
        """[p + 1] first assignment of each expert, and their number."""
        return np.concatenate(([0], np.cumsum(self.counts))).astype(np.int32)

    def tiles(self, block_t: int) -> NDArray[np.int32]:
        """[tiles, 3]: the place of an expert, its next assignment, and how many of them."""
        rows = [
            (place, begin + i, min(block_t, count - i))
            for place, (begin, count) in enumerate(
                zip(self.begins.tolist(), self.counts.tolist(), strict=False)
            )
            for i in range(0, count, block_t)
        ]
        return np.array(rows, np.int32).reshape(-1, 3)


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of int32 and int64 on a device, by one copy that nobody waits for."""
    starts = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)]).tolist()
    cuda = device.type == "cuda"
    # torch keeps pinned memory until the copy has been made.
    here = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=cuda)
    bytes_here = here.numpy()
    for array, start in zip(arrays, starts, strict=False):
        bytes_here[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    there = here.to(device, non_blocking=True) if cuda else here
    types = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}
    return [
        there[start : start + array.nbytes].view(types[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
