"""How far a network is compressed is decided without the inputs that are reported."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from quernstone.bench.bench_pim_networks import NetworkCase, bench_point
from quernstone.bench.cases import pim_networks
from quernstone.bench.cases.pim_networks import NETWORKS, POINTS, Network, first_enough
from quernstone.bench.fidelity import Split
from quernstone.bench.harness import Measure, WrongResult
from quernstone.importers import Graph
from tests.bench.fakes import FakeBenchmark, Stage
from tests.pim import networks


@pytest.mark.parametrize("first", range(7))
def test_the_first_point_is_found_from_which_on_all_are_enough(first: int) -> None:
    points = (3.0, 5.0, 7.0, 9.0, 11.0, 13.0)
    looked: list[float] = []

    def enough(point: float) -> bool:
        looked.append(point)
        return points.index(point) >= first

    assert first_enough(points, enough) == (points[first] if first < 6 else None)
    assert len(set(looked)) == len(looked) <= 3


def _small(monkeypatch: pytest.MonkeyPatch, asked: list[Split], least: float) -> Network:
    def inputs(split: Split) -> list[dict[str, Tensor]]:
        asked.append(split)
        return [{"x": networks.rows(200, 24, seed=len(split))}]

    def kept(base: Graph, changed: Graph, split: Split) -> float:
        (x,) = inputs(split)
        want, got = (next(iter(graph.run(x).values())) for graph in (base, changed))
        return float(torch.cosine_similarity(want, got, dim=-1).mean())

    small = Network(
        "small", networks.perceptron, inputs, snr=30.0, unit="cosine", what="outputs", kept=kept,
        least=least, whole=1.0,
    )  # fmt: skip
    monkeypatch.setitem(NETWORKS, "small", small)
    for name in ("tried", "compressed", "operating_point"):
        fresh = functools.cache(getattr(pim_networks, name).__wrapped__)
        monkeypatch.setattr(pim_networks, name, fresh)
    return small


def test_an_operating_point_is_chosen_without_held_out_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Split] = []
    small = _small(monkeypatch, asked, 0.99)
    found = pim_networks.operating_point("small")
    assert set(asked) == {"calibration", "validation"}
    assert small.wanted == pytest.approx(0.9925)
    assert found.snr is not None
    assert found.kept[found.snr] >= small.wanted
    # It is the first of the points that are enough.
    at = POINTS.index(found.snr)
    assert at == 0 or found.kept[POINTS[at - 1]] < small.wanted
    again = pim_networks.compressed("small", found.snr)
    assert small.kept(again.int8, again.network, "validation") == found.kept[found.snr]


def test_a_row_of_an_operating_point_fails_where_no_point_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = _small(monkeypatch, [], least=1.1)
    found = pim_networks.operating_point("small")
    assert found.snr is None
    assert POINTS[-1] in found.kept
    case = NetworkCase("point", small)
    with pytest.raises(WrongResult, match="30 is in use, of all that was looked at nothing"):
        bench_point(case, Measure(FakeBenchmark(Stage()), case))


def test_operating_points_in_use_are_of_those_to_choose_from() -> None:
    assert all(network.snr in network.points for network in NETWORKS.values())


def test_a_quarter_of_the_promised_loss_is_left_to_inputs_that_are_not_seen() -> None:
    assert NETWORKS["minilm"].wanted == pytest.approx(0.9925)
    assert NETWORKS["detector"].wanted == pytest.approx(0.9625)
    assert NETWORKS["recogniser"].wanted == -0.75
    assert NETWORKS["classifier"].wanted == 99.25
    assert NETWORKS["smollm2"].wanted == -1.5
