"""Weight shift: exact while nothing is cut, in integers, in the graph and in written files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from quernstone.importers import Graph, read, write_onnx
from quernstone.pim import wds
from quernstone.pim.layers import Codes, nearest_codes, weights_of
from tests.importers.tiny import oracle
from tests.pim import networks

NETWORKS = {
    **{kind: networks.conv(kind) for kind in networks.CONVS},
    "1d": networks.conv1d(),
    "transposed": networks.transposed(),
    "transposed, groups": networks.transposed(2),
    "linear": networks.linear(),
}
SHAPES = {"1d": (2, 3, 9), "linear": (7, 24), "perceptron": (7, 24)}


def _integers(name: str, low: int = -128, high: int = 127) -> torch.Tensor:
    shape = SHAPES.get(name, (2, 4, 6, 7))
    return torch.from_numpy(np.random.default_rng(5).integers(low, high + 1, shape))


def _codes(graph: Graph, shift: int, top: int = 90) -> dict[str, Codes]:
    """Integers that a shift does not cut."""
    found = {}
    for weight in weights_of(graph):
        codes = nearest_codes(weight, graph.constants[weight.constant])
        stored = np.clip(codes.stored, -128, top)
        scale = 2.0 ** np.round(np.log2(codes.scale))
        found[weight.constant] = wds.shifted(Codes(weight, stored, scale), shift)
        assert found[weight.constant].clipped == 0
    return found


@pytest.mark.parametrize("zero_point", [0, -37, 128])
@pytest.mark.parametrize("kind", [*networks.CONVS, "1d"])
def test_integer_convolutions_are_those_without_a_shift(kind: str, zero_point: int) -> None:
    graph = NETWORKS[kind]
    x = _integers(kind)
    shifted = _codes(graph, 37)["w"]
    plain = _codes(graph, 0)["w"]
    attributes: Any = graph.nodes[0].attributes
    # torch's own convolution in fp64, exact below 2^53; padding stands for the activation 0.
    sides = [side for pair in reversed(attributes["padding"]) for side in pair]
    padded = functional.pad(x.double() - zero_point, sides)
    run: Any = functional.conv1d if kind == "1d" else functional.conv2d
    want = run(
        padded, torch.from_numpy(plain.stored).double(), None, attributes["stride"], 0,
        attributes["dilation"], attributes["groups"],
    )  # fmt: skip
    got = wds.integer_output(shifted, x, zero_point=zero_point)
    assert got.dtype == torch.int64
    assert torch.equal(got, want.long())


def test_a_cut_weight_is_counted_and_costs_its_excess() -> None:
    graph = networks.perceptron()
    weight = networks.of(graph)
    codes = nearest_codes(weight, graph.constants["w1"])
    high = codes.stored.max()
    moved = wds.shifted(codes, 127 - int(high) + 5)
    over = np.maximum(codes.stored.astype(int) + moved.shift - 127, 0)
    assert moved.clipped == (over > 0).sum() > 0
    x = torch.ones(1, 24, dtype=torch.int64)
    lost = wds.integer_output(codes, x) - wds.integer_output(moved, x)
    assert torch.equal(lost[0], torch.from_numpy(over.sum(1)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_graph_is_the_unshifted_one_to_the_bit(name: str) -> None:
    graph = NETWORKS[name]
    x = {"x": _integers(name).float()}
    plain = wds.fold(graph, _codes(graph, 0)).run(x)["y"]
    folded = wds.fold(graph, _codes(graph, 37)).run(x)["y"]
    assert torch.equal(folded, plain)
    direct = wds.with_codes(graph, _codes(graph, 37)).run(x)["y"]
    torch.testing.assert_close(folded, direct, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_runs_the_shifted_file_to_the_same_bits(name: str, tmp_path: Path) -> None:
    graph = NETWORKS[name]
    x = {"x": _integers(name).float().numpy()}
    paths = {shift: tmp_path / f"{shift}.onnx" for shift in (0, 37)}
    for shift, path in paths.items():
        write_onnx(wds.fold(graph, _codes(graph, shift)), path)
    plain, folded = (oracle(path, x)[0] for path in paths.values())
    np.testing.assert_array_equal(folded, plain)


def test_safetensors_keep_the_folded_graph(tmp_path: Path) -> None:
    graph = networks.perceptron()
    folded = wds.fold(graph, _codes(graph, 16))
    folded.save(tmp_path / "f.safetensors")
    again = read(tmp_path / "f.safetensors")
    x = {"x": _integers("perceptron").float()}
    assert torch.equal(again.run(x)["y"], folded.run(x)["y"])
    np.testing.assert_array_equal(
        again.constants["first.stored"] - 16, _codes(graph, 0)["w1"].stored
    )


def test_an_lstm_keeps_its_numbers() -> None:
    graph = networks.recurrent()
    codes = {w.constant: nearest_codes(w, graph.constants[w.constant]) for w in weights_of(graph)}
    assert set(codes) == {"w", "r"}
    folded = wds.fold(graph, codes)
    assert [node.op for node in folded.nodes] == ["lstm"]
    np.testing.assert_array_equal(folded.constants["r"], codes["r"].values())


def test_an_embedding_keeps_the_weight_that_it_shares() -> None:
    graph = networks.tied()
    (weight,) = weights_of(graph)
    codes = {"w": nearest_codes(weight, graph.constants["w"], bits=3)}
    changed = wds.with_codes(graph, codes)
    np.testing.assert_array_equal(changed.constants["w"], graph.constants["w"])
    ids = {"ids": torch.arange(5)}
    hidden = torch.from_numpy(graph.constants["w"][:5])
    want = hidden @ torch.from_numpy(codes["w"].values()).T
    torch.testing.assert_close(changed.run(ids)["y"], want)
    torch.testing.assert_close(wds.fold(graph, codes).run(ids)["y"], want)


def test_the_search_is_the_best_of_all_choices() -> None:
    layers = [
        Codes(networks.of(networks.perceptron()), stored, np.ones(1), bits=4)
        for stored in np.random.default_rng(3).integers(-8, 5, (3, 20)).astype(np.int16)
    ]
    shifts = (0, 1, 2, 3, 5)
    for share in (0.0, 0.1, 1.0):
        found = wds.search_shifts(layers, shifts, clipped=share)
        every = [
            [wds.shifted(layer, shift) for layer, shift in zip(layers, choice, strict=True)]
            for choice in itertools.product(shifts, repeat=3)
        ]
        allowed = [c for c in every if sum(x.clipped for x in c) <= share * 60]
        least = min(sum(x.ones for x in c) for c in allowed)
        assert sum(x.ones for x in found) == least
        assert sum(x.clipped for x in found) <= share * 60


def test_powers_of_two_fit_the_bits() -> None:
    assert wds.powers_of_two(8) == (0, 1, 2, 4, 8, 16, 32, 64)
    assert wds.powers_of_two(4) == (0, 1, 2, 4)


def test_names_what_is_out_of_range() -> None:
    codes = nearest_codes(networks.of(networks.perceptron()), networks.perceptron().constants["w1"])
    with pytest.raises(ValueError, match="shift: got 200, expected -128 to 127"):
        wds.shifted(codes, 200)
    with pytest.raises(ValueError, match="shift: got 200"):
        wds.search_shifts([codes], (0, 200))
    with pytest.raises(ValueError, match="layers, shifts: got 0 and 1"):
        wds.search_shifts([], (0,))
    with pytest.raises(ValueError, match="clipped: got 2"):
        wds.search_shifts([codes], (0,), clipped=2)
    recurrent = networks.recurrent()
    inner = weights_of(recurrent)[1]
    with pytest.raises(ValueError, match=r"lstm\.recurrent"):
        wds.integer_output(nearest_codes(inner, recurrent.constants["r"]), torch.zeros(1, 5))
