"""A Mixtral of transformers as a GGUF file for ik_llama.cpp, and what its version makes of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quernstone.bench.rivals.ik_llama import Kind, Model, write

Weights = Callable[[str], Tensor]
"""A weight of the model by its name in transformers, floating point."""


def model_of(config: Any) -> Model:
    return Model(
        config.hidden_size,
        config.intermediate_size,
        config.num_local_experts,
        config.num_experts_per_tok,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        float(config.rope_parameters["rope_theta"]),
        config.rms_norm_eps,
    )


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k for a rotation of neighbours instead of halves."""
    rows, inputs = weight.shape
    return weight.view(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs)


def write_mixtral(path: Path, config: Any, weights: Weights, kind: Kind) -> None:
    """The same weights: experts, attention and output in the format, routers and norms in fp32."""
    model = model_of(config)
    half = model.intermediate

    def tensors() -> Iterator[tuple[str, Any, Kind]]:
        yield "token_embd.weight", weights("model.embed_tokens.weight").float(), "F32"
        for i in range(model.layers):
            of = f"model.layers.{i}"
            yield (
                f"blk.{i}.attn_norm.weight",
                weights(f"{of}.input_layernorm.weight").float(),
                "F32",
            )
            norm = weights(f"{of}.post_attention_layernorm.weight").float()
            yield f"blk.{i}.ffn_norm.weight", norm, "F32"
            for name, heads in (("q", model.heads), ("k", model.kv_heads)):
                weight = weights(f"{of}.self_attn.{name}_proj.weight")
                yield f"blk.{i}.attn_{name}.weight", _turned(weight, heads), kind
            yield f"blk.{i}.attn_v.weight", weights(f"{of}.self_attn.v_proj.weight"), kind
            yield f"blk.{i}.attn_output.weight", weights(f"{of}.self_attn.o_proj.weight"), kind
            yield f"blk.{i}.ffn_gate_inp.weight", weights(f"{of}.mlp.gate.weight").float(), "F32"
            both = weights(f"{of}.mlp.experts.gate_up_proj")
            yield f"blk.{i}.ffn_gate_exps.weight", both[:, :half], kind
            yield f"blk.{i}.ffn_up_exps.weight", both[:, half:], kind
            yield f"blk.{i}.ffn_down_exps.weight", weights(f"{of}.mlp.experts.down_proj"), kind
        yield "output_norm.weight", weights("model.norm.weight").float(), "F32"
        yield "output.weight", weights("lm_head.weight"), kind

    write(path, model, tensors())


def rounded(weight: Tensor, kind: Kind) -> Tensor:
    """A matrix as the format holds it, fp32."""
    import gguf

    code = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(np.ascontiguousarray(weight.float().numpy()), code)
    return torch.from_numpy(gguf.quants.dequantize(packed, code))


def logits(
    model: Model,
    matrix: Callable[[str, int | None], Tensor],
    tokens: list[int],
    *,
    onto_normed: bool,
) -> Tensor:
    """Logits after the last token, fp32 sums of fp32 products.

    Args:
        matrix: of a name and, of stacked ones, an expert.
        onto_normed: whether the experts' result is added to the normalised state instead of the
            state itself, as version 0.1.5 of ik_llama.cpp does for the architecture `llama`.
    """
    heads, kv, width = model.heads, model.kv_heads, model.head_width
    count = len(tokens)
    x = matrix("model.embed_tokens.weight", None).float()[tokens]
    frequency = model.rope_base ** (-torch.arange(0, width, 2).double() / width)
    angle = (torch.arange(count).double()[:, None] * frequency).repeat(1, 2)
    cos, sin = angle.cos().float(), angle.sin().float()

    def norm(value: Tensor, name: str) -> Tensor:
        return functional.rms_norm(value, value.shape[-1:], matrix(name, None).float(), model.eps)

    def turned(value: Tensor) -> Tensor:
        first, second = value.chunk(2, -1)
        return value * cos + torch.cat([-second, first], -1) * sin

    for i in range(model.layers):
        of = f"model.layers.{i}"
        h = norm(x, f"{of}.input_layernorm.weight")
        q, k, v = (
            (h @ matrix(f"{of}.self_attn.{name}_proj.weight", None).T)
            .view(count, -1, width)
            .transpose(0, 1)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv, 0) for t in (turned(k), v))
        mixed = functional.scaled_dot_product_attention(
            turned(q)[None], k[None], v[None], is_causal=True
        )
        flat = mixed[0].transpose(0, 1).reshape(count, -1)
        x = x + flat @ matrix(f"{of}.self_attn.o_proj.weight", None).T
        h = norm(x, f"{of}.post_attention_layernorm.weight")
        x = h.clone() if onto_normed else x.clone()
        shares, chosen = (
            (h @ matrix(f"{of}.mlp.gate.weight", None).float().T).softmax(-1).topk(model.top_k)
        )
        shares = shares / shares.sum(-1, keepdim=True)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            both = matrix(f"{of}.mlp.experts.gate_up_proj", expert)
            gate, up = (h[rows] @ both.T).chunk(2, -1)
            inner = functional.silu(gate) * up
            down = matrix(f"{of}.mlp.experts.down_proj", expert)
            x[rows] += shares[rows, place, None] * (inner @ down.T)
    return norm(x[-1], "model.norm.weight") @ matrix("lm_head.weight", None).T
