"""Random mixtures of experts of transformers, small enough to compute in fp64."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch

from quernstone.moe.block import shared_of

VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
}

# name: (class of the configuration and of the model, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 6}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 32,
            # No multiple of the experts' width.
            "shared_expert_intermediate_size": 80,
            "intermediate_size": 96,
            "mlp_only_layers": [1],
            "qkv_bias": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "intermediate_size": 96,
            "head_dim": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "intermediate_size": 32, "num_key_value_heads": 4}),
    "olmoe-clipped": (
        "Olmoe",
        {
            "num_experts": 8,
            "intermediate_size": 32,
            "num_key_value_heads": 4,
            "clip_qkv": 0.5,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **_MLA,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek_v2-groups": (
        "DeepseekV2",
        {
            **_MLA,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_MLA,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode, all its weights random, even those that begin as 0 or 1."""
    return copy.deepcopy(_made(name, json.dumps(changes))).to(dtype)


@functools.cache
def _made(name: str, changes: str) -> Any:
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        **{**_COMMON, **settings, **json.loads(changes)}
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in key else 0.0) + 0.2 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5 * (3.0 if "gate.w" in key else 1.0))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def twin(model: Any, accelerated: Any) -> Any:
    """A copy of the model with the weights as an accelerated one computes with them."""
    made = copy.deepcopy(model)
    handle = accelerated.quernstone
    with torch.no_grad():
        for name, experts in handle.experts.items():
            block = made.get_submodule(name)
            count = len(block.experts.down_proj)
            parts = [experts.matrices(i) for i in range(experts.shape.count)]
            for i, (gate, up, down) in enumerate(parts[:count]):
                block.experts.gate_up_proj[i] = torch.cat([gate, up])
                block.experts.down_proj[i] = down
            shared = shared_of(block)
            if shared is None:
                continue
            width = shared.gate_proj.out_features
            for i, layer in enumerate((shared.gate_proj, shared.up_proj)):
                layer.weight.copy_(torch.cat([part[i] for part in parts[count:]])[:width])
            down = torch.cat([part[2] for part in parts[count:]], 1)
            shared.down_proj.weight.copy_(down[:, :width])
        for name, layer in handle.linears.items():
            made.get_submodule(name).weight.copy_(layer.matrix.unpack())
    return made


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def typical(got: torch.Tensor, want: torch.Tensor) -> float:
    """Median over tokens: a router whose choice was as good as a tie moves one token by much."""
    error = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
    return float(error.median())
