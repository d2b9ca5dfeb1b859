"""The attention operators on a CUDA device: checks, outputs, and launches of the Triton kernels.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.

`torch_op` imports this module when the first CUDA tensor arrives, so that nobody else waits for
Triton.
"""

import contextlib
import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from quernstone.attention import checks
from quernstone.kernels.triton import attention as forward_kernels
from quernstone.kernels.triton import attention_backward as backward_kernels
from quernstone.kernels.triton.attention_configs import Config, candidates, rows_block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIP: int = forward_kernels.STRIP.value
_COUNT_BLOCK = 1024
_SUM_BLOCK = 256
# An option of the compiler, whose default is about to change: products and sums in one instruction.
_FUSED = {"enable_fp_fusion": True}
# A product of bf16 numbers in Triton's interpreter is that of their bits.
DOT_IN_FP32 = False


@dataclass(frozen=True, slots=True)
class _Call:
    """One call whose arguments passed the checks, as the kernels want it."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    gate: Tensor | None
    key_start: Tensor | None
    key_lengths: Tensor | None
    token_mask: Tensor | None
    window: int
    scale: float
    kind: int
    causal: bool
    windowed: bool

    @property
    def mask(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.key_start, self.key_lengths, self.token_mask

    @property
    def constants(self) -> dict[str, Any]:
        return {"CAUSAL": self.causal, "WINDOWED": self.windowed}

    @property
    def width(self) -> dict[str, int]:
        d = self.q.shape[3]
        return {"WIDTH": d, "D": triton.next_power_of_2(d)}

    def gate_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.gate is None else self.gate.stride()[:3]


def sink_attention(*call: Any) -> Tensor:
    return _forward(_prepare(*call), aux=False, training=False)[0]


def sink_attention_aux(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, importance, _ = _forward(_prepare(*call), aux=True, training=False)
    assert lse is not None
    assert importance is not None
    return out, lse, importance


def sink_attention_training(*call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, importance, gate_logit = _forward(_prepare(*call), aux=True, training=True)
    assert lse is not None
    assert importance is not None
    assert gate_logit is not None
    return out, lse, importance, gate_logit


def sink_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    dimportance: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gate_logit: Tensor | None,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    prepared = _prepare(*call)
    q, kind = call[0], call[3]
    checks.check_incoming(q, kind, dout, dlse, dimportance, out, lse, gate_logit)
    with _on(q):
        return _backward(prepared, dout, dlse, dimportance, out, lse, gate_logit)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "sink",
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> _Call:
    """The arguments of an operator; torch leaves out those that are at the end of its call and have
    their default."""
    padding = (key_start, key_lengths)
    checks.check_call(q, k, v, kind, sinks, gate, window, scale, *padding, token_mask, DTYPES)
    t, s = q.shape[2], k.shape[2]
    code = {"sink": forward_kernels.SINK, "vanilla": forward_kernels.VANILLA}.get(kind)
    if code is None:
        assert gate is not None
        code = forward_kernels.GATED if gate.ndim == 3 else forward_kernels.GATED_BY_ELEMENT
        gate = gate if gate.ndim == 3 else _rows(gate)
    # A window that holds every key from every position is none.
    windowed = window is not None and window < (s if causal else max(s, t))
    return _Call(
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        sinks=None if sinks is None else sinks.contiguous(),
        gate=gate,
        key_start=None if key_start is None else key_start.contiguous(),
        key_lengths=None if key_lengths is None else key_lengths.contiguous(),
        token_mask=None if token_mask is None else token_mask.contiguous().view(torch.uint8),
        window=window if windowed and window is not None else 0,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        kind=code.value,
        causal=causal,
        windowed=windowed,
    )


def _rows(x: Tensor) -> Tensor:
    """With channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _forward(
    call: _Call, *, aux: bool, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(out, lse, importance, gate_logit); None for what was not asked for."""
    q, k, v = call.q, call.k, call.v
    (b, h, t, d), (g, s) = q.shape, k.shape[1:3]
    vanilla = call.kind == forward_kernels.VANILLA.value
    out = q.new_empty(b, h, t, d)
    lse = q.new_empty(b, h, t, dtype=torch.float32) if aux else None
    gate_logit = q.new_empty(b if vanilla else 0, h, t, dtype=torch.float32) if training else None
    strips = -(-t // _STRIP)
    gate_sums = q.new_empty(b, h, strips, dtype=torch.float32) if aux else None
    counts = q.new_empty(b, strips, dtype=torch.int32) if aux else None
    importance = q.new_empty(h, dtype=torch.float32) if aux else None
    with _on(q):
        if out.numel() > 0:
            _launch(
                forward_kernels._sink_attention_fwd_kernel,
                "forward",
                call,
                (q, k, v, call.sinks, call.gate, *call.mask, out, lse,
                 gate_logit if vanilla else None, gate_sums, counts,
                 *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.gate_strides(),
                 h, h // g, t, s, call.window, _log2_scale(call.scale)),
                {"KIND": call.kind, "NEGATIVE": call.scale < 0, **call.constants},
            )  # fmt: skip
        if gate_sums is not None and importance is not None:
            _sum(gate_sums, counts, importance)
    return out, lse, importance, gate_logit


def _log2_scale(scale: float) -> float:
    """|scale| log2(e). Never 0, which times the -inf of a hidden key would be NaN."""
    return max(abs(scale) * math.log2(math.e), 2.0**-126)


def _backward(
    call: _Call,
    dout: Tensor,
    dlse: Tensor | None,
    dimportance: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gate_logit: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    (b, h, t, d), (g, s) = q.shape, k.shape[1:3]
    sink, vanilla, by_element = (
        call.kind == kind.value
        for kind in (
            forward_kernels.SINK,
            forward_kernels.VANILLA,
            forward_kernels.GATED_BY_ELEMENT,
        )
    )
    dout, out, lse = _rows(dout), _rows(out), lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = q.new_empty(h if sink else 0, dtype=torch.float32)
    dgate = q.new_empty((0,) if call.gate is None else call.gate.shape)

    per_program = rows_block(triton.next_power_of_2(d))
    row_blocks = -(-t // per_program)
    bases, shifts = q.new_empty(2, b, h, t, dtype=torch.float32)
    # A gate folded into its row's exponent saves a product a score. It costs digits that only
    # fp32 has, and dlse would have to be divided by it.
    gated_row = call.kind in (forward_kernels.SINK.value, forward_kernels.GATED.value)
    apart = gated_row and (dlse is not None or q.dtype is torch.float32)
    weights = q.new_empty(b, h, t, dtype=torch.float32) if apart else None
    first = vanilla and dimportance is not None
    first_shifts = q.new_empty(b, h, t, dtype=torch.float32) if first else None
    gated_dout = q.new_empty(q.shape) if by_element else None
    parts = q.new_empty(b, h, row_blocks, dtype=torch.float32) if sink else None
    if q.numel() > 0:
        counts = None if dimportance is None else _count(call)
        backward_kernels._sink_attention_bwd_rows_kernel[(b * h * row_blocks,)](
            dout, None if dlse is None else dlse.contiguous(),
            None if dimportance is None else dimportance.contiguous(), out, lse,
            gate_logit.contiguous() if first and gate_logit is not None else None,
            call.sinks, call.gate, *call.mask, counts,
            bases, shifts, weights, first_shifts, gated_dout,
            dgate if call.gate is not None else None, parts,
            *dout.stride()[:3], *out.stride()[:3], *call.gate_strides(),
            h, t, s, 0 if counts is None else counts.numel(), call.window,
            KIND=call.kind, **call.constants, **call.width, BLOCK_T=per_program, **_FUSED,
        )  # fmt: skip
    if parts is not None:
        _sum(parts, None, dsinks)
    weighted = dout if gated_dout is None else gated_dout
    rows = (
        q,
        k,
        v,
        weighted,
        bases,
        shifts,
        weights,
        first_shifts,
        call.key_start,
        call.key_lengths,
    )
    strides = tuple(stride for x in (q, k, v, weighted) for stride in x.stride()[:3])
    scales = (call.scale, call.scale * math.log2(math.e))
    if dk.numel() > 0:
        _launch(
            backward_kernels._sink_attention_bwd_keys_kernel,
            "keys",
            call,
            (*rows, dk, dv, *strides, g, h // g, t, s, call.window, *scales),
            call.constants,
            weighted=apart,
        )
    if dq.numel() > 0:
        _launch(
            backward_kernels._sink_attention_bwd_queries_kernel,
            "queries",
            call,
            (*rows, dq, *strides, h, h // g, t, s, call.window, *scales),
            call.constants,
            weighted=apart,
        )
    return dq, dk, dv, dsinks, dgate


def _count(call: _Call) -> Tensor:
    b, _, t, _ = call.q.shape
    blocks = -(-t // _COUNT_BLOCK)
    counts = call.q.new_empty(b, blocks, dtype=torch.int32)
    backward_kernels._sink_attention_count_kernel[(b * blocks,)](
        *call.mask, counts, t, call.k.shape[2], call.window,
        KIND=call.kind, **call.constants, BLOCK=_COUNT_BLOCK, **_FUSED,
    )  # fmt: skip
    return counts


def _sum(parts: Tensor, counts: Tensor | None, out: Tensor) -> None:
    b, h, n = parts.shape
    forward_kernels._sink_attention_sum_kernel[(h,)](
        parts, counts, out, b, h, n, BLOCK=_SUM_BLOCK, **_FUSED
    )


def _launch(
    kernel: Any,
    name: str,
    call: _Call,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    weighted: bool = False,
) -> None:
    q, k = call.q, call.k
    b, h, t, _ = q.shape
    g, s = k.shape[1:3]
    constants = {**constants, **call.width, "DOT_IN_FP32": DOT_IN_FP32, **_FUSED}

    def grid(meta: dict[str, Any]) -> tuple[int]:
        if name == "keys":
            return (b * g * -(-s // meta["BLOCK_S"]),)
        return (b * h * -(-t // meta["BLOCK_T"]),)

    bits = q.element_size() * 8
    if _tunes(q):
        shape = (name, constants["D"], bits, _capability(q.device), weighted)
        # Lengths within a factor of two share their configuration; so do calls of one kind.
        likeness = (call.kind, call.causal, call.windowed, t.bit_length(), s.bit_length())
        tuned = _tuned(kernel, *shape, likeness)
        if tuned.cache or not torch.cuda.is_current_stream_capturing():
            tuned[grid](*arguments, **constants)
            return
    config = pick_config(name, constants["D"], bits, q.device, weighted)
    kernel[grid](*arguments, **constants, **_blocks(config), **_options(config))


def pick_config(name: str, width: int, bits: int, device: torch.device, weighted: bool) -> Config:
    """What runs without the autotuner: a fixed choice for each chip."""
    return candidates(name, width, bits, _capability(device), weighted)[0]


def _tunes(q: Tensor) -> bool:
    """Another configuration adds up in another order: not where bits have to be reproducible."""
    return (
        q.is_cuda
        and os.environ.get("QUERNSTONE_AUTOTUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


@functools.cache
def _tuned(
    kernel: Any,
    name: str,
    width: int,
    bits: int,
    capability: int,
    weighted: bool,
    likeness: tuple[int, ...],
) -> Any:
    """An autotuner of its own for each likeness: Triton's would tune for every length."""
    configs = [
        triton.Config(_blocks(config), **_options(config))
        for config in candidates(name, width, bits, capability, weighted)
    ]
    return triton.autotune(configs=configs, key=[])(kernel)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_T": config.block_t, "BLOCK_S": config.block_s}


def _options(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}
