"""What the evaluations share: how a network is called, and the error of single layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from quernstone.attention.models import real_text
from quernstone.importers import Graph, Node, evaluate

Inputs = Mapping[str, Tensor]
Network = Graph | Callable[[Inputs], Mapping[str, Tensor]]
"""A graph, or a function that takes and gives tensors by the names that the graph has for them."""
Split = Literal["calibration", "held-out"]
"""Inputs to adjust a network with, or others to measure it with."""

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


@functools.cache
def text(split: Split) -> str:
    """Prose from the docstrings of the standard library; each split has its own half."""
    everything = real_text()
    half = len(everything) // 2
    return everything[half:] if split == "held-out" else everything[:half]


@functools.cache
def sentences(split: Split) -> tuple[str, ...]:
    """The sentences of `text` that are neither short nor code, and stand in no other split."""
    flat = " ".join(text(split).split())
    parts = (part.strip() for part in flat.replace("? ", ". ").split(". "))
    known = set(sentences("calibration")) if split == "held-out" else set()
    return tuple(
        part
        for part in dict.fromkeys(parts)
        if part not in known
        and 30 <= len(part) <= 200
        and part.isascii()
        and not set("=<>{}[]\\|_") & set(part)
    )
