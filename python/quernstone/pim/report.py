"""What a network's weights look like to a bit-serial macro: ones, layer by layer.

The table counts every weight that multiplies activations, once: convolutions, linear layers, both
weights of LSTMs. It leaves out embeddings, biases and norms (those that the importer folds into a
layer are part of it), and products of two activations, which have no weights. Integers are
symmetric with a scale for each output channel, `layers.channel_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernstone.importers import Graph, Node
from quernstone.pim import wds
from quernstone.pim.layers import Codes, Weight, nearest_codes, not_offline, weights_of


class LayerRates(NamedTuple):
    """Hamming rates of one weight."""

    name: str
    op: str
    shape: tuple[int, ...]
    hamming_rate: float
    """Of the nearest integers."""
    shift: int
    """Of those tried, the one that leaves the fewest ones within the share that may be cut."""
    shifted_rate: float
    clipped: int


@dataclass(frozen=True)
class Analysis:
    """Hamming rates of a network, each of all its weights together and layer by layer."""

    bits: int
    weights: int
    hamming_rate: float
    same_shift: Mapping[int, tuple[float, float]]
    """For one shift in all layers: the rate, and the share of weights cut."""
    best_shift: float
    """With each layer's own shift."""
    four_bits: float
    """Of 4-bit integers, not shifted."""
    layers: tuple[LayerRates, ...]
    not_offline: tuple[str, ...]
    """Nodes that multiply two activations."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [layer._asdict() for layer in self.layers]}


def analyze(
    model: Graph | Mapping[str, NDArray[Any]],
    *,
    bits: int = 8,
    shifts: Sequence[int] = wds.ANY_SHIFT,
    clipped: float = 0.0,
) -> Analysis:
    """Counts the ones of a network's weights.

    Args:
        model: a graph, or arrays by name as a state dict has them: those of two axes or more are
            weights whose first axis is the output channel.
        bits: of an integer, 2 to 16.
        shifts: that the layers may choose from.
        clipped: share of all weights that these may cut.

    Raises:
        ValueError: bits out of range, a weight that is not finite, no weights, shifts that do not
            fit; messages name the layer.
    """
    pairs = _weights(model)
    rate: dict[int, list[int]] = {8: [0, 0], 16: [0, 0]}
    total = ones = four = 0
    integers: list[Codes] = []
    for weight, array in pairs:
        codes = nearest_codes(weight, array, bits)
        integers.append(codes)
        ones += codes.ones
        total += weight.size
        for shift, sums in rate.items():
            if shift < 1 << (bits - 1):
                moved = wds.shifted(codes, shift)
                sums[0] += moved.ones
                sums[1] += moved.clipped
        four += nearest_codes(weight, array, 4).ones
    best = wds.search_shifts(integers, shifts, clipped=clipped)
    layers = tuple(
        LayerRates(
            weight.name, weight.node.op, weight.shape, before.hamming_rate, after.shift,
            after.hamming_rate, after.clipped,
        )
        for (weight, _), before, after in zip(pairs, integers, best, strict=True)
    )  # fmt: skip
    return Analysis(
        bits=bits,
        weights=total,
        hamming_rate=ones / (bits * total),
        same_shift={
            shift: (sums[0] / (bits * total), sums[1] / total)
            for shift, sums in rate.items()
            if shift < 1 << (bits - 1)
        },
        best_shift=sum(codes.ones for codes in best) / (bits * total),
        four_bits=four / (4 * total),
        layers=layers,
        not_offline=tuple(not_offline(model)) if isinstance(model, Graph) else (),
    )


def _weights(model: Graph | Mapping[str, NDArray[Any]]) -> list[tuple[Weight, NDArray[Any]]]:
    if isinstance(model, Graph):
        return [(weight, model.constants[weight.constant]) for weight in weights_of(model)]
    found = []
    for name, array in model.items():
        array = np.asarray(array)
        if array.ndim < 2 or array.dtype.kind != "f" or not array.size:
            continue
        node = Node(name.removesuffix(".weight"), "linear", ("x", name), (f"{name}.out",))
        found.append((Weight(node, "weight", name, array.shape), array))
    if not found:
        raise ValueError("model: got no array of two axes or more, expected weights")
    return found
