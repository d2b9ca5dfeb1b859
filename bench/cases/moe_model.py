"""A whole mixture of experts of Mixtral's architecture, and the trained tiny ones as Mixtrals."""

from __future__ import annotations

import copy
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
    """Gives a model on no device its parameters, one at a time, and the rotations' buffers."""
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


def of_tinylm(model: TinyLm) -> Any:
    """A trained tinylm of vanilla attention and experts as a Mixtral with the same outputs."""
    from transformers import MixtralForCausalLM

    of = model.config
    config = mixtral_config(
        vocab_size=256,
        hidden_size=of.channels,
        intermediate_size=of.hidden,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        num_key_value_heads=of.heads,
        head_dim=of.head_width,
        num_local_experts=of.experts,
        num_experts_per_tok=of.top_k,
        rms_norm_eps=torch.finfo(torch.float32).eps,
    )
    with torch.device("meta"):
        made = MixtralForCausalLM(config)
    weights = dict(model.named_parameters())
    inner = of.heads * of.head_width

    def weight(name: str, shape: torch.Size) -> Tensor:
        parts = name.split(".")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return weights["embedding.weight"].detach().clone()
        if name == "model.norm.weight":
            return weights["norm.weight"].detach().clone()
        block, rest = f"blocks.{parts[2]}", ".".join(parts[3:])
        if rest.startswith("self_attn.") and parts[4] != "o_proj":
            at = ("q_proj", "k_proj", "v_proj").index(parts[4])
            rows = weights[f"{block}.mixer.qkv.weight"].detach()[at * inner : (at + 1) * inner]
            if at == 2:
                return rows.clone()
            # Neighbours turn as one complex number there, the two halves of a head here.
            heads = rows.view(of.heads, of.head_width // 2, 2, of.channels)
            return heads.transpose(1, 2).reshape(rows.shape)
        names = {
            "self_attn.o_proj.weight": "mixer.out.weight",
            "mlp.gate.weight": "ffn.gate.weight",
            "mlp.experts.gate_up_proj": "ffn.experts.gate_up_proj",
            "mlp.experts.down_proj": "ffn.experts.down_proj",
            "input_layernorm.weight": "norm_mixer.weight",
            "post_attention_layernorm.weight": "norm_ffn.weight",
        }
        found = weights[f"{block}.{names[rest]}"].detach().clone()
        assert found.shape == shape, name
        return found

    materialize(made, weight)
    return made.eval()


def packed_copy(model: Any, **settings: Any) -> Any:
    """An accelerated model with the weights of another, which stays as it is."""
    from quernstone.moe.block import source_of
    from quernstone.moe.hf import Packing, install, linears_of, runtime_of, together
    from quernstone.moe.routing import moe_blocks

    packing = Packing(
        settings.pop("format", "int4"), linear=settings.pop("linear", "int4"), clips=1
    )
    experts = {block.name: packing.experts(source_of(block.module)) for block in moe_blocks(model)}
    linears = linears_of(model)
    matrices = {}
    for names in together(linears):
        matrices.update(packing.matrices({n: linears[n].weight.detach() for n in names}))
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    inside = (*(f"{name}.experts." for name in experts), *(f"{name}." for name in matrices))

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name.startswith(inside):
            return torch.empty(shape, device="meta")
        return model.get_parameter(name).detach()

    materialize(made, weight)
    install(
        made,
        experts,
        matrices,
        compute=settings.pop("compute", None),
        attention="quernstone",
        gating=settings.pop("gating", None),
        runtime=runtime_of({}),
        prefetch=0,
    )
    return made


def weight_of(model: Any) -> Callable[[str, int | None], Tensor]:
    """fp32 weights of a model of transformers by name, of stacked ones an expert's."""

    def weight(name: str, expert: int | None) -> Tensor:
        found = model.get_parameter(name).detach()
        return (found if expert is None else found[expert]).float()

    return weight


def packed_weight_of(model: Any) -> Callable[[str, int | None], Tensor]:
    """The same of an accelerated model, as it computes with them."""
    handle = model.quernstone

    def weight(name: str, expert: int | None) -> Tensor:
        if expert is not None:
            block, _, which = name.rpartition(".experts.")
            gate, up, down = handle.experts[block].matrices(expert)
            return torch.cat([gate, up]) if which == "gate_up_proj" else down
        owner = name.removesuffix(".weight")
        if owner in handle.linears:
            unpacked: Tensor = handle.linears[owner].matrix.unpack()
            return unpacked
        return model.get_parameter(name).detach().float()

    return weight
