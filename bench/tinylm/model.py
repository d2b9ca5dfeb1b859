"""The decoder: bytes in, logits of the next byte out.

Axes: b batch, l layers, t tokens, c channels, h heads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quernstone.bench.tinylm.ffn import FFNS, Moe
from quernstone.bench.tinylm.mixers import MIXERS

BYTES = 256


@dataclass(frozen=True)
class Config:
    """The shape of a model; the defaults are those of the study, 0.44 M parameters."""

    mixer: str = "sink"
    ffn: str = "dense"
    layers: int = 4
    channels: int = 96
    heads: int = 8
    head_width: int = 16
    hidden: int = 192
    """Of the feed-forward network, or of each expert."""
    experts: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, known in (("mixer", MIXERS), ("ffn", FFNS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {[*known]}")
        if self.ffn == "moe" and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: got {self.top_k}, expected 1 to {self.experts}, the experts")
        if self.ffn != "moe" and (self.top_k or self.experts):
            raise ValueError(f"experts: got {self.experts} with {self.ffn!r}, expected 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields; without experts not those that are of experts only."""
        fields = asdict(self)
        if self.ffn != "moe":
            del fields["experts"], fields["top_k"]
        return fields


@dataclass
class Output:
    """Named as transformers does, so that `head_report` takes a `TinyLm`."""

    logits: Tensor
    loss: Tensor | None = None
    importance: Tensor | None = None
    """[l, h] of the layers of attention, with its gradient."""
    router_balance: Tensor | None = None
    """Mean load-balancing loss of the layers with experts, with its gradient."""


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_mixer = nn.RMSNorm(config.channels)
        self.mixer = MIXERS[config.mixer](config)
        self.norm_ffn = nn.RMSNorm(config.channels)
        self.ffn = FFNS[config.ffn](config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, importance = self.mixer(self.norm_mixer(x))
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), importance


class TinyLm(nn.Module):
    """Pre-norm blocks between an embedding and its transpose.

    The weights depend on `seed` alone. Matrices that write to the residual stream begin smaller
    by sqrt(2 l), the custom of GPT-2.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.channels)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deep = name.endswith((".out.weight", ".down.weight", ".down_proj"))
                std = 0.02 / (math.sqrt(2 * config.layers) if deep else 1.0)
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        """Logits [b, t, 256] of the byte after each; with `labels` [b, t] their mean loss, nats."""
        x = self.embedding(input_ids)
        importances = []
        for block in self.blocks:
            x, importance = block(x)
            if importance is not None:
                importances.append(importance)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        balances = [b.ffn.balance for b in self.blocks if isinstance(b.ffn, Moe)]
        return Output(
            logits,
            loss,
            torch.stack(importances) if importances else None,
            torch.stack(balances).mean() if balances else None,
        )

    def parameter_count(self) -> int:
        return sum(weight.numel() for weight in self.parameters())
