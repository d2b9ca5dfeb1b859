"""A whole mixture of experts of Mixtral's architecture, and the trained tiny ones as Mixtrals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quernstone.bench.tinylm.model import TinyLm

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS, VOCABULARY = 2048, 7168, 8, 2, 4, 8192
HEADS, KV_HEADS, HEAD_WIDTH = 16, 4, 128
CONTEXT = 2048
GROUP = 32


def mixtral_config(**changes: Any) -> Any:
    from transformers import MixtralConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        "sliding_window": None,
    }
    return MixtralConfig(**{**settings, **changes})


def large(seed: int = 0) -> Any:
    """Four layers of random bf16 weights, 1.5 billion; a block of numbers is used again and again,
    turned, which no kernel can tell from fresh ones."""
    from transformers import MixtralForCausalLM

    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = MixtralForCausalLM(mixtral_config())
    noise = torch.randn(1 << 22, generator=generator).bfloat16()
    materialize(model, lambda name, shape: _random(name, shape, noise, generator))
    return model.eval()


def materialize(model: Any, weight: Callable[[str, torch.Size], Tensor]) -> None:
    """Gives a model on no device its parameters, one at a time, and the buffers of its rotations."""
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = weight(name, parameter.shape)
        owner = model.get_submodule(parent)
        setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=False))
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config=model.config)


def _random(name: str, shape: torch.Size, noise: Tensor, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16)
    flat, at = out.view(-1), 0
    while at < flat.numel():
        some = min(noise.numel() // 2, flat.numel() - at)
        begin = int(torch.randint(noise.numel() // 2, (1,), generator=generator))
        flat[at : at + some] = noise[begin : begin + some]
        at += some
    if "embed" not in name:
        out *= shape[-1] ** -0.5
    return out
