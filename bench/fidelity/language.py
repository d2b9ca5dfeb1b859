"""Language: embeddings of sentences by MiniLM, and what SmolLM2 needs to say a byte."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from quernstone.bench.fidelity.common import Network, Split, run, sentences, text
from quernstone.importers.models import minilm_tokenizer, smollm2_tokenizer

_LONGEST = 64


# MiniLM -------------------------------------------------------------------------------------------


@functools.cache
def encoded(split: Split, count: int = 256) -> dict[str, Tensor]:
    """Sentences as MiniLM takes them, from all of the split's documents."""
    known = sentences(split)
    tokenizer = minilm_tokenizer()
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch([known[i * len(known) // count] for i in range(count)])
    return {
        "input_ids": torch.tensor([e.ids for e in found]),
        "attention_mask": torch.tensor([e.attention_mask for e in found]),
        "token_type_ids": torch.tensor([e.type_ids for e in found]),
    }


def embed(network: Network, inputs: dict[str, Tensor]) -> Tensor:
    """Unit embeddings [n, c]: the mean over the tokens of each sentence."""
    hidden = run(network, inputs)["last_hidden_state"]
    tokens = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * tokens).sum(1) / tokens.sum(1), dim=-1)


def cosines(base: Network, changed: Network, split: Split = "held-out") -> Tensor:
    """For each sentence the cosine between its embeddings by both networks."""
    both = [embed(network, encoded(split)) for network in (base, changed)]
    return (both[0] * both[1]).sum(-1)


# SmolLM2 ------------------------------------------------------------------------------------------


@functools.cache
def windows(split: Split, count: int = 8, tokens: int = 256) -> tuple[Tensor, int]:
    """Tokens [n, t] of running text from all over the split, and how many bytes all but the first
    of each stand for."""
    tokenizer = smollm2_tokenizer()
    whole = text(split)
    starts = [i * len(whole) // count for i in range(count)]
    rows = [tokenizer.encode(whole[at : at + 12 * tokens]).ids[:tokens] for at in starts]
    read = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    return torch.tensor(rows), read


def bits_per_byte(network: Network, split: Split = "held-out") -> float:
    """What a causal language model needs for each byte of text, on average."""
    ids, read = windows(split)
    nats = 0.0
    for row in ids:
        logits = run(network, {"input_ids": row[None]})["logits"][0, :-1]
        nats += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
    return nats / math.log(2) / read
