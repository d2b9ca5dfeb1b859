"""Llama models in GGUF files: their settings and weights as transformers names them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernstone.importers.gguf_file import Gguf

# GGUF's names of a layer's weights and those of transformers.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def llama_config(file: Gguf) -> dict[str, Any]:
    """The settings of a Llama model, as in transformers' config.json.

    Raises:
        ValueError: a model of another architecture, or a setting that is missing.
    """
    of = file.metadata
    kind = of.get("general.architecture", "llama")
    if kind != "llama":
        raise ValueError(f"general.architecture: got {kind!r}, expected 'llama'")
    try:
        return {
            "model_type": "llama",
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "hidden_size": of["llama.embedding_length"],
            "intermediate_size": of["llama.feed_forward_length"],
            "num_hidden_layers": of["llama.block_count"],
            "num_attention_heads": of["llama.attention.head_count"],
            "num_key_value_heads": of["llama.attention.head_count_kv"],
            "max_position_embeddings": of["llama.context_length"],
            "rms_norm_eps": of["llama.attention.layer_norm_rms_epsilon"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": of["llama.rope.freq_base"],
            },
            "tie_word_embeddings": "output.weight" not in file.tensors,
        }
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: missing") from None


def llama_weights(file: Gguf) -> dict[str, NDArray[np.float32]]:
    """The weights of a Llama model under transformers' names and in its order.

    Raises:
        ValueError: a weight that a Llama model does not have.
    """
    rotated = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, weight in file.tensors.items():
        match name.split("."):
            case ["blk", layer, part, "weight"] if part in _LAYER:
                if part in rotated:
                    # GGUF keeps the two halves that rotate together side by side, head by head.
                    halves = weight.reshape(rotated[part], -1, 2, weight.shape[1])
                    weight = halves.swapaxes(1, 2).reshape(weight.shape)
                key = f"model.layers.{layer}.{_LAYER[part]}.weight"
            case [part, "weight"] if part in _WHOLE:
                key = f"{_WHOLE[part]}.weight"
            case _:
                raise ValueError(f"{name}: a weight that a Llama model does not have")
        weights[key] = weight
    return weights


def llama_tokenizer(file: Gguf) -> Any:
    """The `tokenizers.Tokenizer` of a GGUF file whose pre-tokenizer is "smollm".

    Raises:
        ImportError: the package tokenizers is missing.
        ValueError: another pre-tokenizer.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ImportError("tokenizers is missing: pip install tokenizers") from error

    of = file.metadata
    kind = of.get("tokenizer.ggml.pre")
    if kind != "smollm":
        raise ValueError(f"tokenizer.ggml.pre: got {kind!r}, expected 'smollm'")
    words = of["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in of["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = zip(words, of["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True) for word, kind in kinds if kind == control]
    )
    return tokenizer
