"""What works on each token by itself in a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from quernstone.bench.tinylm.model import Config


class Dense(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.channels, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(functional.silu(gate) * up)
        return down


class Router(nn.Module):
    """The largest of a softmax, their weights summing to 1: as Mixtral and Qwen3-MoE route."""

    def __init__(self, channels: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x, self.weight)
        weights, ids = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class ExpertStack(nn.Module):
    """SwiGLU experts, their matrices stacked as transformers does; each computes its tokens."""

    def __init__(self, experts: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, channels))
        self.down_proj = nn.Parameter(torch.empty(experts, channels, hidden))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        token = order // ids.shape[1]
        loads = torch.bincount(ids.flatten(), minlength=len(self.down_proj)).tolist()
        rows = x[token]
        parts = []
        for e, part in enumerate(rows.split(loads)):
            gate, up = functional.linear(part, self.gate_up_proj[e]).chunk(2, dim=-1)
            parts.append(functional.linear(functional.silu(gate) * up, self.down_proj[e]))
        found = torch.cat(parts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, found)


class Moe(nn.Module):
    """A mixture of experts with the attributes that those of transformers have.

    `balance` is the load-balancing loss of the last call, with its gradient: experts times the
    sum of each one's share of choices and mean probability, 1 at balance (Switch Transformer,
    arXiv 2101.03961, equation 4).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config.channels, config.experts, config.top_k)
        self.experts = ExpertStack(config.experts, config.channels, config.hidden)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        logits, weights, ids = self.gate(rows)
        count = logits.shape[1]
        share = torch.bincount(ids.flatten(), minlength=count) / ids.numel()
        self.balance = count * (share * logits.softmax(-1).mean(0)).sum()
        out: Tensor = self.experts(rows, ids, weights)
        return out.view_as(x)


FFNS: dict[str, Callable[[Config], nn.Module]] = {"dense": Dense, "moe": Moe}
"""By the name that stands in `Config.ffn`; a module maps [b, t, c] to [b, t, c]."""
