"""Attention as others offer it on a CUDA device.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quernstone.bench.cases.attention import AttentionCase, Inputs
from quernstone.bench.harness import Absent

FLASH = "SDPA flash"
CUDNN = "SDPA cuDNN"
FLEX = "flex_attention with sinks"
FA4 = "FlashAttention 4"
# It is compiled anew for every shape, for many seconds: one length tells enough.
FLEX_LENGTH = 4096


@dataclass(frozen=True)
class GpuRival:
    """`forward` gives [b, h, t, d]; `plain` rivals have no sinks and do less than ours."""

    name: str
    forward: Callable[[Inputs], Tensor]
    plain: bool


Offer = Callable[[AttentionCase, torch.device], "GpuRival | Absent | None"]


def sdpa(name: str, backend: str) -> Offer:
    """torch's attention, held to one backend. It has neither sinks nor windows."""

    def offer(case: AttentionCase, _device: torch.device) -> GpuRival | None:
        if case.window is not None:
            return None
        kernels = importlib.import_module("torch.nn.attention")
        chosen = getattr(kernels.SDPBackend, backend)

        def forward(x: Inputs) -> Tensor:
            with kernels.sdpa_kernel(chosen):
                out: Tensor = torch.nn.functional.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=case.causal, enable_gqa=case.heads > case.kv_heads
                )
            return out

        return GpuRival(name, forward, plain=True)

    return offer


def flex(case: AttentionCase, device: torch.device) -> GpuRival | Absent | None:
    """torch's flex_attention, compiled, and the sink as a factor made of its log-sum-exp."""
    if case.queries != FLEX_LENGTH:
        return None
    module = importlib.import_module("torch.nn.attention.flex_attention")
    window = case.window

    def visible(_b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) if window is None else (s <= t) & (s > t - window)

    mask = module.create_block_mask(
        visible, None, None, case.queries, case.keys, device=device.type
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = module.flex_attention(
            q, k, v, block_mask=mask, enable_gqa=case.heads > case.kv_heads, return_lse=True
        )
        gate = torch.sigmoid(lse.float() - sinks.view(1, -1, 1)).unsqueeze(-1)
        result: Tensor = (out * gate).to(q.dtype)
        return result

    compiled = torch.compile(attend, dynamic=False)
    return GpuRival(FLEX, lambda x: compiled(x.q, x.k, x.v, x.sinks), plain=False)


def flash_attention_4(case: AttentionCase, _device: torch.device) -> GpuRival | Absent:
    """FlashAttention's CuTe kernels, which take a learnable sink."""
    try:
        module: Any = importlib.import_module("flash_attn.cute")
    except ImportError as error:
        return Absent(FA4, f"{error}; pip install flash-attn-4")
    window = (None, None) if case.window is None else (case.window - 1, 0)

    def forward(x: Inputs) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
        result = module.flash_attn_func(
            q, k, v, causal=case.causal, window_size=window, learnable_sink=x.sinks.to(q.dtype)
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return GpuRival(FA4, forward, plain=False)


OFFERS: tuple[Offer, ...] = (
    sdpa(FLASH, "FLASH_ATTENTION"),
    sdpa(CUDNN, "CUDNN_ATTENTION"),
    flex,
    flash_attention_4,
)
