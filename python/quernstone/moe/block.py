"""A mixture-of-experts block on packed experts, in the place of one of transformers.

Axes: b batch, s sequence, t = b s tokens, m hidden width, f feed-forward width, e experts,
k choices of a token, n shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quernstone.moe.gating import AdaptiveGating
from quernstone.moe.routing import routed


@dataclass(frozen=True)
class Source:
    """The weights of a block: routed experts, and a shared one cut into as many as fit their width.

    A gated network of width n f is the sum of n networks of width f, so a shared expert becomes
    experts e .. e + n - 1 that every token chooses; one whose width f does not divide is filled
    up with rows of zeros, which add nothing.
    """

    gate_up: Tensor
    """[e, 2 f, m]."""
    down: Tensor
    """[e, m, f]."""
    shared: tuple[Tensor, Tensor, Tensor] | None
    """Gate and up [., m], down [m, .]."""

    @property
    def shared_count(self) -> int:
        return 0 if self.shared is None else -(-self.shared[0].shape[0] // self.down.shape[2])

    def expert(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and up [f, m], down [m, f] of an expert, the shared ones behind the others."""
        count, width = len(self.down), self.down.shape[2]
        if index < count:
            gate, up = self.gate_up[index].detach().chunk(2)
            return gate, up, self.down[index].detach()
        assert self.shared is not None
        begin = (index - count) * width
        gate, up, down = self.shared
        parts = gate[begin : begin + width], up[begin : begin + width], down[:, begin:][:, :width]
        missing = width - len(parts[0])
        if not missing:
            return parts
        pad = nn.functional.pad
        return (
            pad(parts[0], (0, 0, 0, missing)),
            pad(parts[1], (0, 0, 0, missing)),
            pad(parts[2], (0, missing)),
        )


def source_of(block: nn.Module) -> Source:
    """The weights of a block of transformers."""
    experts: Any = block.experts
    shared = shared_of(block)
    if shared is None:
        return Source(experts.gate_up_proj, experts.down_proj, None)
    parts = [
        getattr(shared, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj")
    ]
    return Source(experts.gate_up_proj, experts.down_proj, (parts[0], parts[1], parts[2]))


def shared_of(block: nn.Module) -> nn.Module | None:
    """The shared experts of a block, as one network; None where it has none."""
    for name in ("shared_expert", "shared_experts"):
        found = getattr(block, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


class PackedBlock(nn.Module):
    """Router, gating and experts of a layer; the router is the model's own.

    Args:
        name: of the block in its model.
        router: returns (logits [t, e], weights [t, k], ids [t, k]).
        layer: of a `Runtime`; the shared experts are numbered from `count` on.
        count: e, of the routed experts.
        shared: n.
        shared_gate: a linear layer whose sigmoid weighs the shared experts (Qwen2-MoE), or None.
        gating: drops experts, or None.
        scores: whether the layer is told the router's softmax, which some caches go by.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        layer: nn.Module,
        *,
        count: int,
        shared: int = 0,
        shared_gate: nn.Module | None = None,
        gating: AdaptiveGating | None = None,
        scores: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.count, self.shared, self.gating = name, count, shared, gating
        self.scores = scores
        # `gate` and `experts`: what `moe_blocks` knows a block by.
        self.gate = router
        self.experts = layer
        self.shared_expert_gate = shared_gate
        self.register_buffer(
            "_shared_ids", torch.arange(count, count + shared)[None], persistent=False
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, s, m] or [t, m] to the same shape; no gradient passes."""
        shape = hidden_states.shape
        rows = hidden_states.reshape(-1, shape[-1])
        logits, weights, ids = routed(self.name, self.gate(rows))
        ids, weights = self.choose(ids, weights.float(), rows)
        scores = self._scored(logits) if self.scores else None
        out: Tensor = self.experts(rows, ids, weights, scores)
        return out.view(shape)

    def predict(self, rows: Tensor) -> Tensor:
        """[t, e + n]: the softmax of the router of hidden states, 1 for the shared experts."""
        router: Any = self.gate
        return self._scored(routed(self.name, router(rows.to(router.weight.dtype)))[0])

    def _scored(self, logits: Tensor) -> Tensor:
        return nn.functional.pad(logits.float().softmax(-1), (0, self.shared), value=1.0)

    def choose(self, ids: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts take, [t, k + n]: gated, without those of weight 0, and the shared."""
        if self.gating is not None:
            ids, weights = self.gating.drop(self.name, ids, weights)
        ids = torch.where(weights == 0, -1, ids)
        if not self.shared:
            return ids, weights
        tokens = len(ids)
        if self.shared_expert_gate is None:
            always = torch.ones(tokens, self.shared, dtype=torch.float32)
        else:
            always = self.shared_expert_gate(rows).float().sigmoid().expand(tokens, self.shared)
        every: Any = self._shared_ids
        return torch.cat([ids, every.expand(tokens, -1)], 1), torch.cat([weights, always], 1)
