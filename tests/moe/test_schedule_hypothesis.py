"""Whatever the layer: a feasible schedule, no heuristic before the optimum, no crash."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.moe import Layer, schedule_layer
from quernstone.moe import reference_schedule as reference
from quernstone.moe.schedule import POLICIES

from .layers import HEURISTICS, assert_feasible

EXACT = st.integers(0, 200).map(lambda x: x / 64)
SETTINGS = settings(derandomize=True, max_examples=150, deadline=None, database=None)


@st.composite
def layers(draw: st.DrawFn, times: st.SearchStrategy[float], most: int) -> Layer:
    n = draw(st.integers(0, most))

    def column(one: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(one, min_size=n, max_size=n))

    names = ("cpu_first", "cpu_free", "gpu_free", "pcie_free")
    return Layer(
        np.array(draw(st.lists(st.integers(1, 2**62), min_size=n, max_size=n)), np.int64),
        column(st.sampled_from([0.0, math.inf]) | times),
        column(times),
        column(times) if draw(st.booleans()) else draw(times),
        column(times) if draw(st.booleans()) else draw(times),
        **{name: draw(st.just(0.0) | times) for name in names},
    )


@SETTINGS
@given(layer=layers(EXACT, most=7))
def test_any_layer_has_feasible_schedules_and_the_enumerated_optimum(layer: Layer) -> None:
    ends = {}
    for policy in POLICIES:
        schedule = schedule_layer(layer, policy)
        assert_feasible(layer, schedule)
        ends[policy] = schedule.makespan
    assert ends["exact"] == reference.schedule_layer(layer, "exact").makespan
    assert ends["exact"] <= min(ends.values())
    assert ends["hybrid"] <= min(ends["list"], ends["event"])
    for policy in HEURISTICS:
        assert ends[policy] == reference.schedule_layer(layer, policy).makespan


@SETTINGS
@given(layer=layers(st.floats(0, 1e100), most=12))
def test_times_of_any_size_are_scheduled(layer: Layer) -> None:
    ends = {policy: schedule_layer(layer, policy).makespan for policy in POLICIES}
    assert all(math.isfinite(end) for end in ends.values())
    assert ends["exact"] <= ends["hybrid"] <= min(ends["list"], ends["event"])
    best = schedule_layer(layer, "exact")
    assert best.makespan == max([0.0, *best.end.tolist()])


@SETTINGS
@given(layer=layers(EXACT, most=7), data=st.data())
def test_one_more_cached_expert_never_delays_the_optimum(layer: Layer, data: st.DataObject) -> None:
    there = [i for i in range(len(layer)) if math.isinf(layer.ready[i])]
    if there:
        more = reference.with_cached(layer, [data.draw(st.sampled_from(there))])
        end = schedule_layer(layer, "exact").makespan
        assert schedule_layer(more, "exact").makespan <= end
