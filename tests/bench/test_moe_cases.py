"""The layers that the expert scheduler is measured on, and the figures of its rows."""

import math

import numpy as np
import pytest

from quernstone.bench import bench_moe_schedule as bench
from quernstone.bench import targets
from quernstone.bench.cases.moe import (
    MACHINE,
    MODELS,
    MOST_TOKENS,
    PREFILL_TOKENS,
    REGIMES,
    Model,
    Regime,
    constants_of,
    layer_of,
    model_layers,
)
from quernstone.bench.harness import WrongResult
from quernstone.moe import Layer, reference_schedule

BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_a_regime_has_the_layers_that_its_name_promises(regime: Regime) -> None:
    layers = regime.layers(300)
    assert {len(layer) for layer in layers} == {regime.experts}
    cached = np.mean([np.isfinite(layer.ready).mean() for layer in layers])
    # Four standard deviations of a share.
    spread = 4 * math.sqrt(regime.hit * (1 - regime.hit) / (300 * regime.experts))
    assert abs(cached - regime.hit) <= spread
    loads = np.concatenate([layer.loads for layer in layers])
    assert loads.min() == 1
    assert loads.max() <= MOST_TOKENS
    assert (loads.max() > 1) == (regime.pareto is not None)
    again = regime.layers(300)
    assert all(np.array_equal(a.cpu, b.cpu) for a, b in zip(layers, again, strict=True))
    # Where costs differ within a kind, the optimum is no matter of counts.
    assert all(reference_schedule.uniform(layer) for layer in layers) != regime.mixed


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_model_routes_every_token_to_its_top_k(model: Model, phase: str) -> None:
    tokens = PREFILL_TOKENS if phase == "prefill" else 1
    layers = model_layers(model, "published", phase, 0.25, count=200)
    for layer in layers:
        assert layer.loads.sum() == tokens * model.top_k
        assert layer.loads.max() <= tokens
        assert len(layer) <= model.shape.count
        assert np.isfinite(layer.ready).sum() <= round(0.25 * model.shape.count)
    if phase == "decode":
        assert {len(layer) for layer in layers} == {model.top_k}
        hits = np.mean([np.isfinite(layer.ready).mean() for layer in layers])
        assert hits == pytest.approx(0.25, abs=0.1)


def test_times_follow_from_the_constants() -> None:
    """Mixtral: 176 M weights of 4.5 bits are 99 MB."""
    model = BY_NAME["mixtral-8x7b"]
    shape = model.shape
    weights = 3 * shape.hidden * shape.intermediate
    megabytes = weights * 4.5 / 8 / 1e6
    assert megabytes == pytest.approx(99.1, abs=0.05)
    layer = layer_of(model, "published", np.array([1, 1000]), np.array([True, False]))
    assert layer.transfer[0] == pytest.approx(megabytes / (31.5 * 0.8))
    assert layer.cpu[0] == pytest.approx(megabytes / (128 * 0.6))
    assert layer.gpu[0] == pytest.approx(0.01 + megabytes / (768 * 0.8))
    # A thousand tokens are bound by arithmetic on either side.
    assert layer.cpu[1] == pytest.approx(2e3 * weights / 0.5e12 * 1e3)
    assert layer.gpu[1] == pytest.approx(0.01 + 2e3 * weights / 77.4e12 * 1e3)
    stand_ins = layer_of(model, "repository", np.array([1, 3]), np.array([True, False]))
    assert stand_ins.cpu.tolist() == pytest.approx([0.2, 0.6])
    assert stand_ins.gpu.tolist() == [0.5, 0.5]
    assert stand_ins.cpu_first == 0.79


def test_rows_print_where_each_constant_comes_from() -> None:
    words = constants_of(MODELS[0], "published")
    assert len(words) == 1
    figures = words[0].split("; ")
    assert len(figures) == len(MACHINE.figures)
    assert all("(published)" in figure or "(assumed)" in figure for figure in figures)
    assert "not measured" in constants_of(MODELS[0], "repository")[0]


def test_the_contract_has_every_row_of_the_scheduler() -> None:
    promised = {target.id for target in targets.load() if target.id.startswith("moe.schedule.")}
    cases = [
        case.values[0]
        for function in (bench.bench_regret, bench.bench_planning, bench.bench_speed_up)
        for case in function.pytestmark[0].args[1]
    ]
    assert {case.id for case in cases} == promised
    assert len(cases) == len(promised) == 2 * len(REGIMES) + 3 + 36


def test_a_wrong_optimum_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = REGIMES[0].layers(3)
    assert len(bench._optimum(layers)) == 3
    honest = bench.schedule_layer
    monkeypatch.setattr(bench, "schedule_layer", lambda layer, _: honest(layer, "fixed"))
    with pytest.raises(WrongResult, match="by enumeration"):
        bench._optimum(layers)


def test_regret_is_told_against_the_optimum() -> None:
    layer = Layer([1, 1], [False, False], [4.0, 4.0], 1.0, 1.0)
    assert bench._makespans([layer], "cpu_only").tolist() == [8.0]
    assert bench._optimum([layer]).tolist() == [3.0]
