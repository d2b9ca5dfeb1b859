"""Experts for a few tokens each on a CUDA device, in the bits of the CPU's `reproducible` arithmetic.

The kernels are in ``kernels/cuda/experts.cu``. Compiled, not run on a GPU.

Axes: a assignments (a token at one of its experts) sorted by expert, p experts that have some,
t tokens, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quernstone import _cuda
from quernstone.moe.device_memory import check_places, check_tensors, to_device
from quernstone.moe.experts import ExpertsShape

_FORMATS = {"int4": 4, "int8": 8}


class _Arguments(ctypes.Structure):
    """QsExperts of kernels/cuda/experts.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "offsets", "begins", "tokens")),
        *((name, ctypes.c_void_p) for name in ("x", "out", "scratch")),
        *((name, ctypes.c_int64) for name in ("p", "a", "t", "m", "f", "most")),
        *((name, ctypes.c_int32) for name in ("format", "group", "zero_points")),
    )


class Library:
    """One build of the kernels: the packaged one, or in tests the one for the emulator."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._scratch = library.qs_experts_scratch
        self._scratch.restype = ctypes.c_int64
        self._experts = library.qs_experts
        self._experts.restype = ctypes.c_char_p
        struct_bytes = library.qs_experts_struct_bytes
        struct_bytes.restype = ctypes.c_int64
        if struct_bytes() != ctypes.sizeof(_Arguments):
            raise ImportError(f"{path} is of another version; install quernstone again")

    def experts(
        self,
        shape: ExpertsShape,
        data: Tensor,
        offsets: Sequence[int],
        counts: Sequence[int],
        tokens: Tensor,
        x: Tensor,
    ) -> Tensor:
        """As the function `few_tokens`; the tensors are where this library's kernels run."""
        if shape.format not in _FORMATS:
            raise ValueError(f"shape.format: got {shape.format!r}, expected 'int4' or 'int8'")
        check_tensors(shape, data, counts, tokens, x, torch.float32)
        check_places(shape, data, offsets, counts)
        out = torch.empty((len(tokens), shape.hidden), dtype=torch.float32, device=x.device)
        if not counts:
            return out
        places = to_device(np.asarray(offsets, np.int64), x.device)
        begins = to_device(np.cumsum([0, *counts]).astype(np.int32), x.device)
        given = {
            **{"data": data, "offsets": places, "begins": begins},
            **{"tokens": tokens, "x": x, "out": out},
        }
        arguments = _Arguments(
            **{name: tensor.data_ptr() for name, tensor in given.items()},
            p=len(counts),
            a=len(tokens),
            t=len(x),
            m=shape.hidden,
            f=shape.intermediate,
            most=max(counts),
            format=_FORMATS[shape.format],
            group=shape.group,
            zero_points=shape.zero_points,
        )
        scratch = torch.empty(
            self._scratch(ctypes.byref(arguments)), dtype=torch.uint8, device=x.device
        )
        arguments.scratch = scratch.data_ptr()
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
            error = self._experts(ctypes.byref(arguments), ctypes.c_void_p(stream))
        if error is not None:
            raise RuntimeError(f"experts: {error.decode()}")
        return out


def few_tokens(
    shape: ExpertsShape,
    data: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    tokens: Tensor,
    x: Tensor,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each assignment, without the router's weight.

    Activations are rounded to 8 bits in groups of 32, products of a group are exact, and everything
    in fp32 happens in the order of csrc/moe/README.md: a row has the bits that `Experts` gives on the
    CPU with `reproducible`, whatever comes along. An expert's weights are read again for every four
    of its tokens.

    Args:
        shape: of the layer, int4 or int8; its count is not used.
        data: uint8 on the device, in which packed experts lie, at an address divisible by 64.
        offsets: [p] bytes from its beginning to each expert, multiples of 64.
        counts: [p] assignments of each, 1 or more.
        tokens: [a] int32 on the device, rows of x by expert and assignment; not looked at.
        x: [t, m] fp32 on the device, contiguous.

    Returns:
        [a, m] fp32.

    Raises:
        ValueError: a shape, an offset or a count that does not fit, bf16 weights.
        TypeError: a tensor of another dtype.
        ImportError: this installation has no CUDA kernels, or those of another version.
        RuntimeError: the device refused the launch, in CUDA's words.

    Source: the feed-forward block of Mixtral (arXiv 2401.04088, section 2.1). Oracles:
    `quernstone.moe.Experts` on the CPU, `quernstone.moe.reference.experts`.
    """
    if not x.is_cuda:
        raise ValueError(f"x.device: got {x.device}, expected cuda")
    return _packaged().experts(shape, data, offsets, counts, tokens, x)


@lru_cache(maxsize=1)
def _packaged() -> Library:
    return Library(_cuda.required())
