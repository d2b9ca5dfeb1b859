"""A trace through cache and scheduler, against the same by hand."""

from __future__ import annotations

import numpy as np
import pytest

from quernstone.moe import PRESETS, CostModel, Curve, ExpertsShape, Trace, schedule_layer
from quernstone.moe.simulate import plan_layer, plan_step, simulate

SHAPE = ExpertsShape(8, 64, 32)


def costs() -> CostModel:
    return CostModel(
        SHAPE,
        cpu=Curve((1, 2), (2.0, 4.0)),
        gpu=Curve((1, 100), (0.5, 0.5)),
        cpu_first=1.0,
        transfer=3.0,
        cpu_source="assumed",
        gpu_source="assumed",
    )


def trace(tokens: int = 40, together: int = 1) -> Trace:
    random = np.random.default_rng(0)
    scores = random.dirichlet(np.full(8, 0.3), (3, tokens))
    return Trace.of(scores, 2, steps=np.arange(tokens) // together)


def test_by_hand() -> None:
    """Three experts and room for all: each misses the first time."""
    ids = np.array([[[0, 1], [1, 2], [1, 2]]], np.int16)
    made = Trace(3, ids, np.arange(3, dtype=np.int32))
    found = simulate(made, costs(), 3, cache="lru", policies=("fixed", "cpu_only", "gpu_only"))
    # Hits: none; 1; both. CPU 2 an expert and 1 for the first, GPU 0.5, transfer 3.
    assert found.hit_rate == pytest.approx(3 / 6)
    assert found.seconds["cpu_only"] == 3 * 5.0
    assert found.seconds["fixed"] == 5.0 + 3.0 + 1.0
    assert found.seconds["gpu_only"] == 6.5 + 3.5 + 1.0
    assert found.speed_up("cpu_only") == pytest.approx(9 / 15)
    with pytest.raises(ValueError, match="policy: got 'hybrid', expected one of fixed"):
        found.speed_up("hybrid")


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("cache", ["lru", "reuse", "belady"])
def test_plans_add_up(cache: str, together: int) -> None:
    made = trace(together=together)
    found = simulate(made, costs(), 3, cache=cache, policies=("hybrid", "fixed"))  # type: ignore[arg-type]
    for policy in ("hybrid", "fixed"):
        plans = [
            plan_step(made, costs(), 3, step, cache=cache, policy=policy)  # type: ignore[arg-type]
            for step in range(made.number_of_steps)
        ]
        assert sum(p.makespan for p in plans) == pytest.approx(found.seconds[policy])  # type: ignore[index]
    active = sum(len(set(made.ids[layer, :together].ravel().tolist())) for layer in range(3))
    assert len([i for i in plans[0].intervals if i.kind == "compute"]) == active
    assert found.seconds["hybrid"] <= found.seconds["fixed"]


def test_more_slots_hit_more_and_take_less() -> None:
    made = trace()
    runs = [simulate(made, costs(), slots, cache="belady") for slots in (0, 2, 4, 8)]
    assert runs[0].hit_rate == 0.0
    rates = [run.hit_rate for run in runs]
    assert rates == sorted(rates)
    times = [run.seconds["fixed"] for run in runs]
    assert times == sorted(times, reverse=True)


def test_a_layer_as_a_plan() -> None:
    layer = CostModel.of_machine(PRESETS["h100"], SHAPE).layer([1, 3, 2], [True, False, False])
    plan = plan_layer(layer, "exact", "a layer")
    assert plan.makespan == schedule_layer(layer, "exact").makespan
    assert plan.title == "a layer"
    assert "<svg" in plan.svg()


def test_names_what_is_unknown() -> None:
    with pytest.raises(ValueError, match="policies: got 'luck'"):
        simulate(trace(), costs(), 1, policies=("luck",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="policy: got 'luck'"):
        simulate(trace(), costs(), 1, cache="luck")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step: got 40, expected 0 to 39"):
        plan_step(trace(), costs(), 1, 40)
    bare = trace()
    bare = Trace(bare.experts, bare.ids, bare.steps)
    with pytest.raises(ValueError, match="scores"):
        simulate(bare, costs(), 1)
