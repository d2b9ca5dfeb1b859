"""How far the error of one layer goes: to the outputs of its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    found: dict[str, float] = {}
    with torch.no_grad():
        wanted = [base.run(batch) for batch in batches]
        for layer, (name, codes) in zip(compressed.layers, compressed.codes.items(), strict=True):
            if layer.snr >= _UNCHANGED_DECIBELS:
                continue
            product = f"{name}.product"
            changed = {
                product if product in base.constants else name: torch.from_numpy(codes.values())
            }
            error = 0.0
            for batch, want in zip(batches, wanted, strict=True):
                error += _apart(base.run(batch, constants=changed), want)
            found[layer.name] = error / 10 ** (-layer.snr / 10)
    mean = sum(found.values()) / len(found) if found else 0.0
    if mean == 0.0:
        return {layer.name: 1.0 for layer in compressed.layers}
    return {layer.name: found.get(layer.name, mean) / mean for layer in compressed.layers}


def _apart(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Squared error over square, summed over the outputs of real numbers."""
    total = 0.0
    for name, tensor in want.items():
        if tensor.is_floating_point():
            power = float(tensor.double().square().sum())
            error = float((got[name].double() - tensor.double()).square().sum())
            total += error / power if power else 0.0
    return total
