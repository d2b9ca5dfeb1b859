"""What the evaluations share: how a network is called, and the error of single layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from quernstone.bench.tinylm import corpus
from quernstone.importers import Graph, Node, evaluate

Inputs = Mapping[str, Tensor]
Network = Graph | Callable[[Inputs], Mapping[str, Tensor]]
"""A graph, or a function that takes and gives tensors by the names that the graph has for them."""
Split = Literal["calibration", "validation", "held-out"]
"""Inputs to adjust a network with, others to choose among adjusted ones, others to report."""
SPLITS: tuple[Split, ...] = get_args(Split)

# The op, and the input that is the activation.
_MEASURED = {"conv": 0, "conv_transpose": 0, "linear": 0, "lstm": 0}


def run(network: Network, inputs: Inputs) -> Mapping[str, Tensor]:
    """The outputs of a network by name."""
    with torch.no_grad():
        return network.run(inputs) if isinstance(network, Graph) else network(inputs)


def layer_snr(base: Graph, changed: Graph, batches: Iterable[Inputs]) -> dict[str, float]:
    """The signal-to-noise ratio in dB of each layer's output, on the inputs that it has in `base`.

        10 log10( sum y^2 / sum (y' - y)^2 )

    y is what the layer gives with the constants of `base`, y' with those of `changed`: what a layer
    is blamed for is its own error, not that of the layers before it.

    Args:
        base: the graph that runs.
        changed: a graph of the same nodes with other constants.
        batches: inputs; sums go over all of them.

    Returns:
        For each conv, conv_transpose, linear and lstm node its ratio; infinity where nothing
        changed.
    """
    power: dict[str, list[float]] = {}

    def compare(node: Node, given: Sequence[Tensor | None]) -> Tensor | list[Tensor]:
        made = evaluate(node, given)
        if node.op in _MEASURED:
            other = [
                torch.from_numpy(changed.constants[name]) if name in changed.constants else x
                for name, x in zip(changed[node.name].inputs, given, strict=True)
            ]
            signal = made[0].double()
            noise = evaluate(node, other)[0].double() - signal
            sums = power.setdefault(node.name, [0.0, 0.0])
            sums[0] += float(signal.square().sum())
            sums[1] += float(noise.square().sum())
        return made

    with torch.no_grad():
        for batch in batches:
            base.run(batch, hook=compare)
    return {name: _decibel(signal, noise) for name, (signal, noise) in power.items()}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def seed(split: Split, of: int) -> tuple[int, int]:
    """A seed for the inputs of one kind; each split has its own."""
    return of, SPLITS.index(split)


@functools.cache
def text(split: Split) -> str:
    """Prose from the documentation of the standard library; each split has its own documents.

    Calibration has the documents that `tinylm` trains on, the others share those that it does not.
    """
    known = corpus.documentation()
    documents = known.train if split == "calibration" else known.held_out
    names = sorted(documents)
    if split != "calibration":
        names = names[split == "held-out" :: 2]
    return "\n\n".join(documents[name] for name in names)


@functools.cache
def sentences(split: Split) -> tuple[str, ...]:
    """The sentences of `text` that are neither short nor code, and stand in no earlier split."""
    flat = " ".join(text(split).split())
    parts = (part.strip() for part in flat.replace("? ", ". ").split(". "))
    known = {one for before in SPLITS[: SPLITS.index(split)] for one in sentences(before)}
    return tuple(
        part
        for part in dict.fromkeys(parts)
        if part not in known
        and 30 <= len(part) <= 200
        and part.isascii()
        and not set("=<>{}[]\\|_") & set(part)
    )


@functools.cache
def words(split: Split) -> tuple[str, ...]:
    """Those of `sentences`, in their order."""
    return tuple(" ".join(sentences(split)).split())
