"""The decode step on a CUDA device: at most 8 queries against a long cache of keys.

The kernels are in ``kernels/cuda/attention.cu``. CMake builds them where it finds nvcc, into a
library of its own, which is loaded at the first call. Compiled, not run on a GPU.

Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width.
"""

import ctypes
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quernstone import _cuda
from quernstone.attention.checks import MAX_WIDTH, MIN_WIDTH, check_call
from quernstone.attention.types import Kind

MAX_QUERIES = 8

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_KINDS = {"sink": 0, "vanilla": 1, "gated": 2}
_NO_WINDOW = 2**32 - 1  # beyond every position; sums with one still fit into 64 bits


class _Arguments(ctypes.Structure):
    """QsAttentionDecode of kernels/cuda/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "gate", "sinks")),
        *((name, ctypes.c_void_p) for name in ("key_start", "key_lengths", "token_mask")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "importance", "scratch")),
        *((name, ctypes.c_int64) for name in "bhgtsd"),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "gate")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "kind", "causal", "gate_per_element")),
    )


class Library:
    """One build of the kernels: the packaged one, or in tests the one for the emulator."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._scratch = library.qs_attention_decode_scratch
        self._scratch.restype = ctypes.c_int64
        self._decode = library.qs_attention_decode
        self._decode.restype = ctypes.c_char_p
        struct_bytes = library.qs_attention_decode_struct_bytes
        struct_bytes.restype = ctypes.c_int64
        if struct_bytes() != ctypes.sizeof(_Arguments):
            raise ImportError(f"{path} is of another version; install quernstone again")

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kind: Kind = "sink",
        sinks: Tensor | None = None,
        gate: Tensor | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        key_start: Tensor | None = None,
        key_lengths: Tensor | None = None,
        token_mask: Tensor | None = None,
        aux: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As the function `decode`; the tensors are where this library's kernels run."""
        padding = (key_start, key_lengths)
        check_call(q, k, v, kind, sinks, gate, window, scale, *padding, token_mask, tuple(_DTYPES))
        device = q.device
        b, h, t, d = q.shape
        q, k, v = (_last_axis_contiguous(x) for x in (q, k, v))
        gate_per_element = gate is not None and gate.ndim == 4
        if gate is not None and gate_per_element:
            gate = _last_axis_contiguous(gate)
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
        if key_start is not None:
            key_start = key_start.to(torch.int64).contiguous()
        if key_lengths is not None:
            key_lengths = key_lengths.to(torch.int64).contiguous()
        if token_mask is not None:
            token_mask = token_mask.contiguous()

        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        lse = torch.empty((b, h, t), dtype=torch.float32, device=device) if aux else None
        importance = torch.empty(h, dtype=torch.float32, device=device) if aux else None
        given = {
            **{"q": q, "k": k, "v": v, "gate": gate, "sinks": sinks},
            **{"key_start": key_start, "key_lengths": key_lengths, "token_mask": token_mask},
            **{"out": out, "lse": lse, "importance": importance},
        }
        arguments = _Arguments(
            **{name: x.data_ptr() for name, x in given.items() if x is not None},
            **{"b": b, "h": h, "g": k.shape[1], "t": t, "s": k.shape[2], "d": d},
            **{f"{name}_stride": _strides(given[name]) for name in ("q", "k", "v", "gate")},
            window=min(window or 0, _NO_WINDOW),
            scale=d**-0.5 if scale is None else scale,
            dtype=_DTYPES[q.dtype],
            kind=_KINDS[kind],
            causal=causal,
            gate_per_element=gate_per_element,
        )
        scratch = torch.empty(
            self._scratch(ctypes.byref(arguments)), dtype=torch.uint8, device=device
        )
        arguments.scratch = scratch.data_ptr()
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device:
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
            error = self._decode(ctypes.byref(arguments), ctypes.c_void_p(stream))
        if error is not None:
            raise RuntimeError(f"attention decode: {error.decode()}")
        return out, lse, importance


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether `decode` computes a call with these tensors: few queries, on a GPU with kernels."""
    return (
        q.is_cuda
        and q.dtype in _DTYPES
        and q.ndim == k.ndim == 4
        and q.shape[2] <= MAX_QUERIES
        and MIN_WIDTH <= q.shape[3] <= MAX_WIDTH
        and _cuda.available()
        and torch.cuda.get_device_capability(q.device)[0] >= 8
    )


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: Kind = "sink",
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    token_mask: Tensor | None = None,
    aux: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention of a few queries against a cache on a CUDA device, with any kind of gate.

    Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width.

    Args:
        q: [b, h, t, d] fp32, fp16 or bf16 on a CUDA device; t at most 8, d 16 to 256. Sums are
            fp32. Any strides; read in place where the last axis is contiguous.
        k, v: [b, g, s, d], dtype of q. 16-byte aligned rows are read fastest.
        kind, sinks, gate, causal, window, scale, token_mask: as `sink_attention` of
            `quernstone.attention`, on the device of q.
        key_start, key_lengths: [b] int32 or int64. Values outside 0..s are taken as the nearest
            inside: looking at them would wait for the device.
        aux: give the log-sum-exp and the importance too.

    Returns:
        out [b, h, t, d] contiguous, in the dtype of q; with `aux` also lse [b, h, t] fp32 in nats
        and importance [h] fp32, else None twice. A row's bits depend on that row alone.

    Raises:
        ValueError: an argument that does not fit; the message names it, what came and what was
            expected.
        ImportError: this installation has no CUDA kernels, or those of another version.
        RuntimeError: the device refused the launch, in CUDA's words.

    Source: split keys and a merge by log-sum-exp, "Flash-Decoding"; gates and importance of arXiv
    2602.01203, section 3. Oracle `quernstone.attention.reference.sink_attention`.
    """
    if not q.is_cuda:
        raise ValueError(f"q.device: got {q.device}, expected cuda")
    if q.ndim == 4 and q.shape[2] > MAX_QUERIES:
        raise ValueError(f"q.shape[2] (queries): got {q.shape[2]}, expected at most {MAX_QUERIES}")
    masks = (key_start, key_lengths, token_mask)
    return _packaged().decode(q, k, v, kind, sinks, gate, causal, window, scale, *masks, aux)


@lru_cache(maxsize=1)
def _packaged() -> Library:
    return Library(_cuda.required())


def _last_axis_contiguous(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> Any:
    return (ctypes.c_int64 * 3)(*((0, 0, 0) if x is None else x.stride()[:3]))
