"""The checks of an attention call that the compiled operator makes in C++, in the same words.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

MIN_WIDTH = 16
MAX_WIDTH = 256
_MAX_KEYS = 2**31 - 1
_MAX_FP32 = torch.finfo(torch.float32).max


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    sinks: Tensor | None,
    gate: Tensor | None,
    window: int | None,
    scale: float | None,
    key_start: Tensor | None,
    key_lengths: Tensor | None,
    token_mask: Tensor | None,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Raises ValueError, naming the argument, unless a kernel may read these tensors.

    Of `key_start` and `key_lengths` the extents are checked and not the values, which may lie on a
    device that a look would stall.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _on_device(name, x, q)
        _same(f"{name}.ndim", x.ndim, "", 4)
    if q.dtype not in dtypes:
        names = [str(dtype) for dtype in dtypes]
        _refuse("q.dtype", q.dtype, f"{', '.join(names[:-1])} or {names[-1]}")
    _dtype("k", k, q.dtype)
    _dtype("v", v, q.dtype)
    if kind not in ("sink", "vanilla", "gated"):
        _refuse("kind", kind, "'sink', 'vanilla' or 'gated'")
    if window is not None and window < 1:
        _refuse("window", window, "at least 1")
    if scale is not None and abs(scale) > _MAX_FP32:
        _refuse("scale", f"{scale:f}", "a finite number that fp32 holds")
    if sinks is not None:
        _on_device("sinks", sinks, q)
        _same("sinks.ndim", sinks.ndim, "", 1)
        if sinks.dtype is not torch.float32:
            _dtype("sinks", sinks, q.dtype)
    if gate is not None:
        _on_device("gate", gate, q)
        if gate.ndim != 3:
            _same("gate.ndim", gate.ndim, "3 or", 4)
        _dtype("gate", gate, q.dtype)
        if gate.ndim == 4:
            _same("gate.shape[3] (head width)", gate.shape[3], "q.shape[3] =", q.shape[3])
    for name, positions in (("key_start", key_start), ("key_lengths", key_lengths)):
        if positions is not None:
            _on_device(name, positions, q)
            _same(f"{name}.ndim", positions.ndim, "", 1)
            if positions.dtype not in (torch.int64, torch.int32):
                _refuse(f"{name}.dtype", positions.dtype, "torch.int64 or torch.int32")
    if token_mask is not None:
        _on_device("token_mask", token_mask, q)
        _same("token_mask.ndim", token_mask.ndim, "", 2)
        _dtype("token_mask", token_mask, torch.bool)
    _extents(q, k, v, kind, sinks, gate, scale, key_start, key_lengths, token_mask)


def _extents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    sinks: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
    key_start: Tensor | None,
    key_lengths: Tensor | None,
    token_mask: Tensor | None,
) -> None:
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    _same("k.shape[0] (batch)", k.shape[0], "q.shape[0] =", b)
    _same("v.shape[0] (batch)", v.shape[0], "q.shape[0] =", b)
    _same("v.shape[1] (heads)", v.shape[1], "k.shape[1] =", g)
    _same("v.shape[2] (keys)", v.shape[2], "k.shape[2] =", s)
    _same("k.shape[3] (head width)", k.shape[3], "q.shape[3] =", d)
    _same("v.shape[3] (head width)", v.shape[3], "q.shape[3] =", d)
    if not MIN_WIDTH <= d <= MAX_WIDTH:
        _refuse("q.shape[3] (head width)", d, f"{MIN_WIDTH} to {MAX_WIDTH}")
    if g == 0 or h == 0 or h % g != 0:
        _refuse("q.shape[1] (query heads)", h, f"a positive multiple of k.shape[1] = {g}")
    if max(s, t) > _MAX_KEYS:
        _refuse("q.shape[2] or k.shape[2]", max(s, t), f"at most {_MAX_KEYS}")
    if scale is not None and not math.isfinite(scale):
        _refuse("scale", scale, "a finite number")
    if kind == "sink":
        if sinks is None:
            _refuse("sinks", "None", "a tensor [h] for kind 'sink'")
        _same("sinks.shape[0]", sinks.shape[0], "q.shape[1] =", h)
    elif sinks is not None:
        _refuse("sinks", "a tensor", "None unless kind is 'sink'")
    if kind == "gated":
        if gate is None:
            _refuse("gate", "None", "logits [b, h, t] or [b, h, t, d] for kind 'gated'")
        _same("gate.shape[0] (batch)", gate.shape[0], "q.shape[0] =", b)
        _same("gate.shape[1] (heads)", gate.shape[1], "q.shape[1] =", h)
        _same("gate.shape[2] (queries)", gate.shape[2], "q.shape[2] =", t)
    elif gate is not None:
        _refuse("gate", "a tensor", "None unless kind is 'gated'")
    for name, positions in (("key_start", key_start), ("key_lengths", key_lengths)):
        if positions is not None:
            _same(f"{name}.shape[0]", positions.shape[0], "the batch size", b)
    if token_mask is not None:
        _same("token_mask.shape[0] (batch)", token_mask.shape[0], "q.shape[0] =", b)
        _same("token_mask.shape[1] (queries)", token_mask.shape[1], "q.shape[2] =", t)


def check_incoming(
    q: Tensor,
    kind: str,
    dout: Tensor,
    dlse: Tensor | None,
    dimportance: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gate_logit: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument, unless these go with a call that passed."""
    _saved("dout", dout, q, q.shape, q.dtype)
    _saved("out", out, q, q.shape, q.dtype)
    _saved("lse", lse, q, q.shape[:3])
    if dlse is not None:
        _saved("dlse", dlse, q, q.shape[:3])
    if dimportance is not None:
        _saved("dimportance", dimportance, q, q.shape[1:2])
        if kind == "vanilla":
            if gate_logit is None:
                _refuse("gate_logit", "None", "the gate_logit of sink_attention_training")
            _saved("gate_logit", gate_logit, q, q.shape[:3])


def _saved(
    name: str,
    x: Tensor,
    q: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    _on_device(name, x, q)
    _same(f"{name}.ndim", x.ndim, "", len(shape))
    _dtype(name, x, dtype)
    for got, want in zip(x.shape, shape, strict=True):
        _same(f"{name}.shape", got, "the extent in the forward pass,", want)


def _on_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        _refuse(f"{name}.device", x.device, str(q.device))


def _dtype(name: str, x: Tensor, want: torch.dtype) -> None:
    if x.dtype is not want:
        _refuse(f"{name}.dtype", x.dtype, str(want))


def _same(what: str, got: int, want: str, number: int) -> None:
    if got != number:
        _refuse(what, got, f"{want} {number}".lstrip())


def _refuse(what: str, got: Any, want: str) -> NoReturn:
    raise ValueError(f"{what}: got {got}, expected {want}")
