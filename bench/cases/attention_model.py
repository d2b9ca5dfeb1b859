"""The main job: real models, real text, one attention implementation swapped for another."""

from __future__ import annotations

import copy
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "quernstone"


SENTENCES = 32
# About four characters a token in English prose; documentation has somewhat fewer.
CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True)
class ModelCase:
    id: str
    tokens: int = 0
    threads: int = 2
    quick: bool = False


Variant = tuple[Any, Any]
"""(model in eval mode, tokenizer)"""


def smollm2(implementation: str) -> Variant:
    """SmolLM2-135M-Instruct in fp32; its variants share their weights.

    Raises ImportError with the command that brings what is missing.
    """
    return _variant("load_smollm2", implementation)


def minilm(implementation: str) -> Variant:
    """all-MiniLM-L6-v2 in fp32; its variants share their weights.

    Raises ImportError with the command that brings what is missing.
    """
    return _variant("load_minilm", implementation)


@functools.lru_cache(maxsize=8)
def _variant(loader: str, implementation: str) -> Variant:
    if implementation == "eager":
        models = importlib.import_module("quernstone.attention.models")
        loaded: Variant = getattr(models, loader)("eager")
        return loaded
    model, tokenizer = _variant(loader, "eager")
    # A copy that shares every tensor, so that one process can alternate implementations.
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation(implementation)
    return twin, tokenizer


def tokens(tokenizer: Any, count: int) -> Tensor:
    """[1, count] token ids of documentation text."""
    words = _documentation()[: CHARACTERS_PER_TOKEN * count]
    ids: Tensor = tokenizer(words, return_tensors="pt").input_ids
    if ids.shape[1] < count:
        raise ValueError(f"{ids.shape[1]} tokens of text, asked {count}")
    return ids[:, :count]


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    """[1, t, vocabulary]"""
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """What comes before the first generated token: all layers, the logits of the last position."""
    result: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    return result


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    chat = [{"role": "user", "content": prompt}]
    words = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(words, return_tensors="pt")
    out = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens)
    return str(tokenizer.decode(out[0, batch.input_ids.shape[1] :], skip_special_tokens=True))


@torch.inference_mode()
def embeddings(model: Any, batch: Any) -> Tensor:
    """[b, d] mean over the tokens of each sentence, at unit length."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def sentence_batch(tokenizer: Any) -> Any:
    """Sentences of varied length in one padded batch."""
    lines = (text.splitlines()[0] for text in _documentation().split("\n\n") if text.strip())
    whole = dict.fromkeys(line for line in lines if line.endswith(".") and " " in line)
    return tokenizer(list(whole)[:SENTENCES], padding=True, return_tensors="pt")


def _documentation() -> str:
    words: str = importlib.import_module("quernstone.attention.models").real_text()
    return words


def largest_difference(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).abs().max())
