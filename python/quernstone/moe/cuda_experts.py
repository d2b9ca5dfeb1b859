"""Experts for a few tokens each on a CUDA device, in the bits of the CPU's own arithmetic.

The kernels are in ``kernels/cuda/experts.cu``. Compiled, not run on a GPU.

Axes: a assignments (a token at one of its experts) sorted by expert, p experts that have some,
t tokens, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone import _cuda
from quernstone.moe.device_memory import Batch, to_device
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
        self._gate_up = library.qs_experts_gate_up
        self._gate_up.restype = ctypes.c_char_p
        self._down = library.qs_experts_down
        self._down.restype = ctypes.c_char_p
        struct_bytes = library.qs_experts_struct_bytes
        struct_bytes.restype = ctypes.c_int64
        if struct_bytes() != ctypes.sizeof(_Arguments):
            raise ImportError(f"{path} is of another version; install quernstone again")

    def call(
        self,
        shape: ExpertsShape,
        data: Tensor,
        offsets: Sequence[int],
        counts: Sequence[int],
        tokens: NDArray[Any],
        x: Tensor,
    ) -> Call:
        """A call as `few_tokens` makes it; the tensors are where this library's kernels run."""
        if shape.format not in _FORMATS:
            raise ValueError(f"shape.format: got {shape.format!r}, expected 'int4' or 'int8'")
        batch = Batch(shape, data, offsets, counts, tokens, x, torch.float32)
        return Call(self, shape, data, batch, x)


class Call:
    """One call in two halves, between which a stream may wait for the weights of down.

    `gate_up` and then `down` queue their kernels on torch's current stream.
    """

    def __init__(
        self, library: Library, shape: ExpertsShape, data: Tensor, batch: Batch, x: Tensor
    ) -> None:
        self._library = library
        self._device = x.device
        count = len(batch.tokens)
        self._out = torch.empty((count, shape.hidden), dtype=torch.float32, device=x.device)
        self._arguments: _Arguments | None = None
        if not count:
            return
        tables = to_device([batch.offsets, batch.begins, batch.tokens], x.device)
        names = ("data", "offsets", "begins", "tokens", "x", "out")
        given = dict(zip(names, (data, *tables, x, self._out), strict=True))
        arguments = _Arguments(
            **{name: tensor.data_ptr() for name, tensor in given.items()},
            p=len(batch.counts),
            a=count,
            t=len(x),
            m=shape.hidden,
            f=shape.intermediate,
            most=int(batch.counts.max()),
            format=_FORMATS[shape.format],
            group=shape.group,
            zero_points=shape.zero_points,
        )
        size = library._scratch(ctypes.byref(arguments))
        scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
        arguments.scratch = scratch.data_ptr()
        self._arguments = arguments
        self._kept = (given, scratch)

    def gate_up(self) -> None:
        """Queues what reads x, gate and up."""
        self._queue(self._library._gate_up)

    def down(self) -> Tensor:
        """Queues what reads down, and gives [a, m] fp32."""
        self._queue(self._library._down)
        return self._out

    def _queue(self, kernels: Callable[..., bytes | None]) -> None:
        if self._arguments is None:
            return
        cuda = self._device.type == "cuda"
        with torch.cuda.device(self._device) if cuda else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if cuda else None
            error = kernels(ctypes.byref(self._arguments), ctypes.c_void_p(stream))
        if error is not None:
            raise RuntimeError(f"experts: {error.decode()}")


def few_tokens(
    shape: ExpertsShape,
    data: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    tokens: NDArray[Any],
    x: Tensor,
) -> Call:
    """down(silu(gate(x)) * up(x)) of each assignment, without the router's weight.

    Activations are rounded to 8 bits in groups of 32, products of a group are exact, and everything
    in fp32 happens in the order of csrc/moe/README.md: a row has the bits that `Experts` gives on
    the CPU with `compute="int8"`, whatever comes along. An expert's weights are read again for
    every four of its tokens.

    Args:
        shape: of the layer, int4 or int8; its count is not used.
        data: uint8 on the device, in which packed experts lie, at an address divisible by 64.
        offsets: [p] bytes from its beginning to each expert, multiples of 64.
        counts: [p] assignments of each, 1 or more.
        tokens: [a] rows of x, by expert and assignment.
        x: [t, m] fp32 on the device, contiguous.

    Returns:
        The `Call`, of which nothing has been queued.

    Raises:
        ValueError: a shape, an offset, a count or a token that does not fit, bf16 weights.
        TypeError: a tensor of another dtype.
        ImportError: this installation has no CUDA kernels, or those of another version.

    Source: the feed-forward block of Mixtral (arXiv 2401.04088, section 2.1). Oracles:
    `quernstone.moe.Experts` on the CPU, `quernstone.moe.reference.experts`.
    """
    if not x.is_cuda:
        raise ValueError(f"x.device: got {x.device}, expected cuda")
    return _packaged().call(shape, data, offsets, counts, tokens, x)


@lru_cache(maxsize=1)
def _packaged() -> Library:
    return Library(_cuda.required())
