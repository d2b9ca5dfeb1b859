"""Experts on a CUDA device by the Triton kernels: any format, any number of tokens.

Axes: a assignments (a token at one of its experts) sorted by expert, p experts that have some,
t tokens, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.kernels.triton import moe as kernels
from quernstone.kernels.triton.moe_configs import Config, pick
from quernstone.moe.device_memory import check_places, check_tensors, to_device
from quernstone.moe.experts import ExpertsShape

# A product of bf16 numbers in Triton's interpreter is that of their bits.
DOT_IN_FP32 = False

_BITS = {"int4": kernels.INT4, "int8": kernels.INT8, "bf16": kernels.BF16}
_FUSED = {"enable_fp_fusion": True}


def grouped_experts(
    shape: ExpertsShape,
    data: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    tokens: Tensor,
    x: Tensor,
    *,
    config: Config | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each assignment, without the router's weight.

    Weights and activations are multiplied as bf16, sums are fp32. A row depends on its own token and
    on which configuration runs, which the largest of `counts` decides.

    Args:
        shape: of the layer; its count is not used.
        data: uint8 on the device, in which packed experts lie, at an address divisible by 64.
        offsets: [p] bytes from its beginning to each expert, multiples of 64.
        counts: [p] assignments of each, 1 or more.
        tokens: [a] int32 on the device, rows of x by expert and assignment; not looked at.
        x: [t, m] bf16 on the device, contiguous.
        config: of the kernels; None is that of the table.

    Returns:
        [a, m] fp32.

    Raises:
        ValueError: a shape, an offset or a count that does not fit.
        TypeError: a tensor of another dtype.

    Source: the feed-forward block of Mixtral (arXiv 2401.04088, section 2.1). Oracle:
    `quernstone.moe.reference.experts`.
    """
    check_tensors(shape, data, counts, tokens, x, torch.bfloat16)
    check_places(shape, data, offsets, counts)
    out = x.new_empty(len(tokens), shape.hidden, dtype=torch.float32)
    if not counts:
        return out
    config = config or pick(max(counts), _capability(x.device))
    tiles = to_device(tile_table(counts, config.block_t), x.device)
    places = to_device(np.asarray(offsets, np.int64), x.device)
    inner = x.new_empty(len(tokens), shape.intermediate)
    common: dict[str, Any] = {
        "BITS": _BITS[shape.format].value,
        "GROUP": shape.group,
        "ZEROS": shape.zero_points,
        "BLOCK_N": config.block_n,
        "BLOCK_T": config.block_t,
        "BLOCK_K": config.block_k,
        "DOT_IN_FP32": DOT_IN_FP32,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **_FUSED,
    }
    across, down = matrix_bytes(shape, across=True), matrix_bytes(shape, across=False)
    sizes = (len(tiles), shape.hidden, shape.intermediate)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernels._experts_gate_up_kernel[(len(tiles) * -(-shape.intermediate // config.block_n),)](
            data, places, tiles, tokens, x, inner, *sizes, **common, **across
        )
        kernels._experts_down_kernel[(len(tiles) * -(-shape.hidden // config.block_n),)](
            data, places, tiles, inner, out, *sizes, **common, **down,
            BEFORE=2 * across["BLOCK_BYTES"] * -(-shape.intermediate // 16),
        )  # fmt: skip
    return out


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


def tile_table(counts: Sequence[int], block_t: int) -> NDArray[np.int32]:
    """[tiles, 3]: the place of an expert, its next assignment, and how many of them."""
    rows = []
    begin = 0
    for place, count in enumerate(counts):
        rows += [(place, begin + i, min(block_t, count - i)) for i in range(0, count, block_t)]
        begin += count
    return np.array(rows, np.int32).reshape(-1, 3)
