"""The report of a network's weights: counted by hand, and the recorded table of real networks."""

from __future__ import annotations

from importlib import metadata

import numpy as np
import pytest

from quernstone.bench.cases import pim_networks
from quernstone.importers import models
from quernstone.pim.report import analyze
from tests.pim import networks


def _rate(array: np.ndarray, bits: int, shift: int = 0) -> float:  # type: ignore[type-arg]
    """Plain Python, a weight at a time."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    ones = 0
    for row in array.reshape(len(array), -1).tolist():
        scale = max(min(row) / low, max(row) / high)
        for value in row:
            code = min(high, max(low, round(value / scale)))
            code = min(high, max(low, code + shift))
            ones += (code & ((1 << bits) - 1)).bit_count()
    return ones / (bits * array.size)


def test_rates_are_those_of_counting_by_hand() -> None:
    graph = networks.perceptron()
    found = analyze(graph)
    sizes = [graph.constants[name].size for name in ("w1", "w2")]
    for got, bits, shift in (
        (found.hamming_rate, 8, 0),
        (found.same_shift[8][0], 8, 8),
        (found.same_shift[16][0], 8, 16),
        (found.four_bits, 4, 0),
    ):
        each = [_rate(graph.constants[name], bits, shift) for name in ("w1", "w2")]
        assert got == pytest.approx(np.average(each, weights=sizes))
    assert found.weights == sum(sizes)
    assert found.best_shift <= found.hamming_rate
    assert all(layer.clipped == 0 for layer in found.layers)


def test_arrays_and_a_graph_of_them_are_counted_alike() -> None:
    graph = networks.perceptron()
    arrays = {name: graph.constants[name] for name in ("w1", "w2", "b1")}
    assert analyze(arrays).hamming_rate == analyze(graph).hamming_rate


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("detector", models.PP_OCR),
        ("recogniser", models.PP_OCR),
        ("classifier", models.PP_OCR),
        ("magika", models.MAGIKA),
        ("silero", models.SILERO),
    ],
)
def test_real_networks_have_the_recorded_rates(name: str, package: str) -> None:
    if not any(metadata.distributions(name=package)):
        pytest.skip(f"pip install --no-deps {package}")
    assert pim_networks.deviation(name) <= 0.001


def test_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="model: got no array of two axes"):
        analyze({"b": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="bits: got 40"):
        analyze(networks.perceptron(), bits=40)
    with pytest.raises(ValueError, match="w: got a weight that is not finite"):
        analyze({"w": np.full((2, 2), np.nan, np.float32)})
