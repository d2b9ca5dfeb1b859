"""What the gates of a model say: their distribution, dead heads, and the drained first value.

Works on any model whose layers call the attention of this package, tinylm or transformers, with a
batch that holds `labels`. Axes: b batch, l layers, h query heads, g key heads, t tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quernstone.attention import head_report, sink_attention
from quernstone.attention.hf import probed

BINS = 50
SHARES = (0.125, 0.25, 0.5)
# Places within a sequence at which other values are set to zero, for comparison with the first.
OTHERS = (0.25, 0.5, 0.75)


def gate_histogram(model: nn.Module, batch: Mapping[str, Any]) -> list[float]:
    """Shares of all gates (every layer, head and token) in 50 equal bins from 0 to 1.

    The first token of a vanilla head sees no key but the first and is left out, as it is of the
    importance.
    """
    counts = np.zeros(BINS)

    def probe(_module: nn.Module, qkv: Any, options: dict[str, Any], _mask: Any) -> Tensor:
        out, aux = sink_attention(*qkv, **options, return_aux=True)
        gates = _gates(qkv[0], qkv[1], aux.lse, options)
        counts[:] += np.histogram(gates.flatten().numpy(), BINS, (0.0, 1.0))[0]
        return out

    with torch.no_grad(), probed(model, probe):
        model(**batch)
    return [round(x, 6) for x in (counts / counts.sum()).tolist()]


def _gates(q: Tensor, k: Tensor, lse: Tensor, options: Mapping[str, Any]) -> Tensor:
    """[b, h, t] of causal attention without padding or window."""
    if options["kind"] == "gated":
        return options["gate"].sigmoid()
    if options["kind"] == "sink":
        return (lse - options["sinks"].view(-1, 1)).sigmoid()
    scale = options["scale"] or q.shape[-1] ** -0.5
    first = k[:, :, :1].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logit = (q * first).sum(-1) * scale
    return (1.0 - (logit - lse).exp()).clamp(0.0, 1.0)[..., 1:]


def heads(
    model: nn.Module,
    batch: Mapping[str, Any],
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> dict[str, Any]:
    """Dead heads and what zeroing heads costs (nats), from `head_report`.

    `seed` is of the heads drawn at random; `shares` are the shares of all heads to zero beside
    the dead ones.
    """
    first = head_report(model, batch, ablation=False)
    dead = [len(first.dead_heads) / first.importance.size] if first.dead_heads else []
    report = head_report(model, batch, shares=[*dead, *shares], seed=seed)
    assert report.ablation is not None
    least, random = report.ablation.least_important, report.ablation.random
    return {
        "dead_heads": [list(head) for head in report.dead_heads],
        "dead_below": report.dead_below,
        "sink_rate": report.sink_rate,
        "sink_epsilon": report.sink_epsilon,
        "first_token": float(report.first_token.mean()),
        "loss": report.ablation.loss,
        "without_dead_heads": least[0] if dead else 0.0,
        "without_as_many_at_random": random[0] if dead else 0.0,
        "shares": list(shares),
        "least_important": list(least[len(dead) :]),
        "random": list(random[len(dead) :]),
    }


def value_drain(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """How small the first token's value is, and what the loss is without it.

    Returns:
        `norm` [l][g]: norm of the first value over the mean norm of the others, mean over b;
        `loss`, and `without_first`, `without_other`: what the loss (nats) gains when the value
        of the first token, or of one other token (mean over three), is zero for every head.
    """
    norms: list[list[float]] = []

    def measure(_module: nn.Module, qkv: Any, options: dict[str, Any], _mask: Any) -> Tensor:
        size = qkv[2].float().norm(dim=-1)
        norms.append((size[..., 0] / size[..., 1:].mean(-1)).mean(0).tolist())
        out: Tensor = sink_attention(*qkv, **options)
        return out

    with torch.no_grad(), probed(model, measure):
        loss = float(model(**batch).loss)
    length = batch["input_ids"].shape[1]
    others = [_loss_without_value(model, batch, int(share * length)) for share in OTHERS]
    return {
        "norm": norms,
        "loss": loss,
        "without_first": _loss_without_value(model, batch, 0) - loss,
        "without_other": sum(others) / len(others) - loss,
    }


def _loss_without_value(model: nn.Module, batch: Mapping[str, Any], token: int) -> float:
    def probe(_module: nn.Module, qkv: Any, options: dict[str, Any], _mask: Any) -> Tensor:
        q, k, v = qkv
        v = v.clone()
        v[:, :, token] = 0.0
        out: Tensor = sink_attention(q, k, v, **options)
        return out

    with torch.no_grad(), probed(model, probe):
        return float(model(**batch).loss)
