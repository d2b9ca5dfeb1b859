"""What mixes tokens in a block: attention whose heads carry a sink, a gate or nothing.

Axes: b batch, t tokens, c channels, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quernstone.attention import Kind, sink_attention
from quernstone.attention.hf import PROBE
from quernstone.attention.hf_mask import KeyMask

if TYPE_CHECKING:
    from quernstone.bench.tinylm.model import Config

Mixed = tuple[Tensor, Tensor | None]
"""[b, t, c] and, from attention, the importance [h] of its heads with its gradient."""

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal attention with rotary positions through `quernstone.attention.sink_attention`.

    `kind` "sink" learns one logit per head, "gated" one gate per head and token (headwise).
    """

    def __init__(self, config: Config, kind: Kind) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.kind, self.heads, self.width = kind, config.heads, config.head_width
        self.qkv = nn.Linear(config.channels, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.channels, bias=False)
        self.sinks = nn.Parameter(torch.zeros(config.heads)) if kind == "sink" else None
        gates = kind == "gated"
        self.gate = nn.Linear(config.channels, config.heads, bias=False) if gates else None
        self.attend: Callable[..., Any] = sink_attention
        """Replaced where another implementation is wanted: by the reference, in the tests."""

    def forward(self, x: Tensor) -> Mixed:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.width)
        rotated = _rotate(qkv[:, :, :2])
        q, k = (y.transpose(1, 2) for y in rotated.unbind(2))
        v = qkv[:, :, 2].transpose(1, 2)
        gate = None if self.gate is None else self.gate(x).transpose(1, 2)
        probe = self.__dict__.get(PROBE)
        importance = None
        if probe is None:
            out, aux = self.attend(
                q, k, v, kind=self.kind, sinks=self.sinks, gate=gate, return_aux=True
            )
            out, importance = out.to(x.dtype), aux.importance
        else:
            # What `head_report` puts in the place of the attention function of a model.
            options: dict[str, Any] = {
                "kind": self.kind,
                "sinks": self.sinks,
                "gate": gate,
                "causal": True,
            }
            options |= dict.fromkeys(("window", "scale", "key_start", "key_lengths"))
            mask = KeyMask(batch, tokens, tokens, tokens, causal=True)
            out = probe(self, (q, k, v), options, mask)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, -1)), importance


def _rotate(x: Tensor) -> Tensor:
    """[b, t, ..., h, d]: neighbouring channels turn as one complex number, by an angle in t."""
    tokens, width = x.shape[1], x.shape[-1]
    speed = torch.exp(torch.arange(0, width, 2) * (-math.log(ROTARY_BASE) / width))
    angle = torch.outer(torch.arange(tokens).float(), speed)
    turn = torch.polar(torch.ones_like(angle), angle)
    turn = turn.view(1, tokens, *[1] * (x.dim() - 3), width // 2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2)


MIXERS: dict[str, Callable[[Config], nn.Module]] = {
    "sink": partial(Attention, kind="sink"),
    "vanilla": partial(Attention, kind="vanilla"),
    "gated": partial(Attention, kind="gated"),
}
"""By the name that stands in `Config.mixer`; a module maps [b, t, c] to `Mixed`."""
