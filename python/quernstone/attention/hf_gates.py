"""Fusing the output gate of Qwen3-Next, which transformers applies outside its interface.

Axes: b batch, t tokens, h query heads, d head width.
"""

import sys
from types import MethodType
from typing import Any

from torch import Tensor, nn

from quernstone.attention.hf import NAME, attention_forward

# Layers whose q_proj yields [b, t, h, 2 d]: the queries and, beside them, the gate logits.
_GATED = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")


def fuse_gates(model: nn.Module) -> list[str]:
    """Have `sink_attention` apply the element-wise output gates of a Qwen3-Next model.

    transformers multiplies the output of such a layer by sigmoid(gate) after the attention
    function has returned. This replaces `forward` on the instances of these layers, so that the
    gate is part of the call (kind "gated") and `head_report` sees it. Results are equal up to
    rounding. Where the model runs with another attn_implementation, the layer's own forward
    is called. `unfuse_gates` takes it back.

    Args:
        model: a model with Qwen3-Next (or Qwen3.5) attention layers.

    Returns:
        The names of the layers with a fused gate.

    Raises:
        ValueError: no such layer, or one whose forward somebody else has replaced.

    Source: Qwen3-Next (gated attention, arXiv 2505.06708). Oracle: the unpatched layer.
    """
    layers = _gated(model)
    if not layers:
        raise ValueError(f"model: got {type(model).__name__}, expected layers of {_GATED}")
    for name, layer in layers.items():
        if not _fused(layer):
            if "forward" in layer.__dict__:
                raise ValueError(f"model: the forward of {name} has been replaced already")
            layer.forward = MethodType(_forward, layer)
    return list(layers)


def unfuse_gates(model: nn.Module) -> None:
    """Undo `fuse_gates`; a model without fused gates is left as it is."""
    for layer in _gated(model).values():
        if _fused(layer):
            del layer.forward


def unfused(model: nn.Module) -> bool:
    """Whether `fuse_gates` would change the model."""
    return any(not _fused(layer) for layer in _gated(model).values())


def _gated(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ in _GATED}


def _fused(layer: nn.Module) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) is _forward


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if self.config._attn_implementation != NAME:
        unpatched: tuple[Tensor, Tensor | None] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return unpatched
    tokens = hidden_states.shape[:-1]
    heads = (*tokens, -1, self.head_dim)
    query, gate = self.q_proj(hidden_states).view(*tokens, -1, 2 * self.head_dim).chunk(2, dim=-1)
    query = self.q_norm(query).transpose(1, 2)
    key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
    value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    # Each model family has a rotation of its own, beside its attention layer.
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    out, weights = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        gate=gate.transpose(1, 2),
        **kwargs,
    )
    return self.o_proj(out.flatten(2)), weights
