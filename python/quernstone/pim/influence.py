"""How far the error of one layer goes: to the outputs of its network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quernstone.importers import Node, evaluate

if TYPE_CHECKING:
    from quernstone.pim.network import Compressed

# A layer beyond this ratio is as good as unchanged: what it does is noise of the arithmetic.
_UNCHANGED_DECIBELS = 70.0


def influence(compressed: Compressed, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The relative squared error of the outputs, over that of a layer which alone is rounded.

    The network runs once for each layer and batch: a few inputs do. `Candidates.choose` takes the
    result as sensitivities, so that layers which matter keep more ones.

    Args:
        compressed: at a fidelity at which every layer is changed, "each" at 28 dB for example.
        batches: calibration inputs by name.

    Returns:
        By names of layers, 1 on average; a layer that is as good as unchanged has the mean.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("batches: got none, expected at least one")
    base = compressed.int8
    place = {node.name: at for at, node in enumerate(base.nodes)}
    changed = [
        (layer, name, codes)
        for layer, (name, codes) in zip(compressed.layers, compressed.codes.items(), strict=True)
        if layer.snr < _UNCHANGED_DECIBELS
    ]
    found = dict.fromkeys((layer.name for layer, _, _ in changed), 0.0)
    with torch.no_grad():
        for batch in batches:
            known: dict[str, list[Tensor]] = {}
            want = base.run(batch, hook=functools.partial(_remember, known))
            for layer, name, codes in changed:
                product = f"{name}.product"
                key = product if product in base.constants else name
                # What is before the layer stays as it is.
                before = base.nodes[: place[codes.weight.node.name]]
                same = {node.name: known[node.name] for node in before}
                got = base.run(
                    batch,
                    constants={key: torch.from_numpy(codes.values())},
                    hook=functools.partial(_instead, same),
                )
                found[layer.name] += _apart(got, want) / 10 ** (-layer.snr / 10)
    mean = sum(found.values()) / len(found) if found else 0.0
    if mean == 0.0:
        return {layer.name: 1.0 for layer in compressed.layers}
    return {layer.name: found.get(layer.name, mean) / mean for layer in compressed.layers}


def _remember(
    known: dict[str, list[Tensor]], node: Node, given: Sequence[Tensor | None]
) -> list[Tensor]:
    known[node.name] = evaluate(node, given)
    return known[node.name]


def _instead(
    same: Mapping[str, list[Tensor]], node: Node, _: Sequence[Tensor | None]
) -> list[Tensor] | None:
    return same.get(node.name)


def _apart(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Squared error over square, summed over the outputs of real numbers."""
    total = 0.0
    for name, tensor in want.items():
        if tensor.is_floating_point():
            power = float(tensor.double().square().sum())
            error = float((got[name].double() - tensor.double()).square().sum())
            total += error / power if power else 0.0
    return total
