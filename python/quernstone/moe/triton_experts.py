"""Experts on a CUDA device by the Triton kernels: any format, any number of tokens.

Axes: a assignments (a token at one of its experts) sorted by expert, p experts that have some,
t tokens, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.kernels.triton import moe as kernels
from quernstone.kernels.triton.moe_configs import Config, pick
from quernstone.moe.device_memory import Batch, to_device
from quernstone.moe.experts import ExpertsShape

# A product of bf16 numbers in Triton's interpreter is that of their bits.
DOT_IN_FP32 = False

_BITS = {"int4": kernels.INT4, "int8": kernels.INT8, "bf16": kernels.BF16}


class Call:
    """One call in two halves, between which a stream may wait for the weights of down.

    `gate_up` and then `down` queue their kernels on torch's current stream.
    """

    def __init__(
        self, shape: ExpertsShape, data: Tensor, batch: Batch, x: Tensor, config: Config | None
    ) -> None:
        self._shape, self._data, self._x = shape, data, x
        count = len(batch.tokens)
        self._out = x.new_empty(count, shape.hidden, dtype=torch.float32)
        self._inner = x.new_empty(count, shape.intermediate)
        self._tiles = 0
        if not count:
            return
        self._config = config or pick(int(batch.counts.max()), _capability(x.device))
        tiles = batch.tiles(self._config.block_t)
        self._tiles = len(tiles)
        self._tables = to_device([batch.offsets, tiles, batch.tokens], x.device)

    def gate_up(self) -> None:
        """Queues what reads x, gate and up."""
        places, tiles, tokens = self._tables if self._tiles else (None, None, None)
        self._queue(
            kernels._experts_gate_up_kernel,
            self._shape.intermediate,
            (self._data, places, tiles, tokens, self._x, self._inner),
            matrix_bytes(self._shape, across=True),
        )

    def down(self) -> Tensor:
        """Queues what reads down, and gives [a, m] fp32."""
        places, tiles, _ = self._tables if self._tiles else (None, None, None)
        across = matrix_bytes(self._shape, across=True)["BLOCK_BYTES"]
        before = 2 * across * -(-self._shape.intermediate // 16)
        self._queue(
            kernels._experts_down_kernel,
            self._shape.hidden,
            (self._data, places, tiles, self._inner, self._out),
            {**matrix_bytes(self._shape, across=False), "BEFORE": before},
        )
        return self._out

    def _queue(
        self, kernel: Any, outputs: int, arguments: tuple[Any, ...], constants: dict[str, int]
    ) -> None:
        if not self._tiles:
            return
        shape, config, x = self._shape, self._config, self._x
        grid = (self._tiles * -(-outputs // config.block_n),)
        # Triton launches on the current device.
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[grid](
                *arguments,
                self._tiles,
                shape.hidden,
                shape.intermediate,
                BITS=_BITS[shape.format].value,
                GROUP=shape.group,
                ZEROS=shape.zero_points,
                **constants,
                BLOCK_N=config.block_n,
                BLOCK_T=config.block_t,
                BLOCK_K=config.block_k,
                DOT_IN_FP32=DOT_IN_FP32,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,
            )


def grouped_experts(
    shape: ExpertsShape,
    data: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    tokens: NDArray[Any],
    x: Tensor,
    *,
    config: Config | None = None,
) -> Call:
    """down(silu(gate(x)) * up(x)) of each assignment, without the router's weight.

    Weights and activations are multiplied as bf16, sums are fp32. A row depends on its own token
    and on which configuration runs, which the largest of `counts` decides.

    Args:
        shape: of the layer; its count is not used.
        data: uint8 on the device, in which packed experts lie, at an address divisible by 64.
        offsets: [p] bytes from its beginning to each expert, multiples of 64.
        counts: [p] assignments of each, 1 or more.
        tokens: [a] rows of x, by expert and assignment.
        x: [t, m] bf16 on the device, contiguous.
        config: of the kernels; None is that of the table.

    Returns:
        The `Call`, of which nothing has been queued.

    Raises:
        ValueError: a shape, an offset, a count or a token that does not fit.
        TypeError: a tensor of another dtype.

    Source: the feed-forward block of Mixtral (arXiv 2401.04088, section 2.1). Oracle:
    `quernstone.moe.reference.experts`.
    """
    batch = Batch(shape, data, offsets, counts, tokens, x, torch.bfloat16)
    return Call(shape, data, batch, x, config)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def matrix_bytes(shape: ExpertsShape, *, across: bool) -> dict[str, int]:
    """What csrc/gemm/gemm.h says of a block of gate and up, or of down."""
    inputs = shape.hidden if across else shape.intermediate
    unit = shape.group if shape.format == "int4" else 32
    padded = -(-inputs // unit) * unit
    bits = _BITS[shape.format].value
    scales = {"int4": 32 * (padded // unit), "int8": 64, "bf16": 0}[shape.format]
    zeros = 16 * (padded // unit) if shape.zero_points else 0
    codes = 2 * padded * bits
    return {
        "CODE_BYTES": codes,
        "SCALE_BYTES": scales,
        "BLOCK_BYTES": -(-(codes + scales + zeros) // 64) * 64,
        "PADDED": padded,
    }
