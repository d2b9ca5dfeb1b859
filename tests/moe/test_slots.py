"""Slots per layer: the formula against AdapMoE's and enumeration, the split against all splits."""

import dataclasses
import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.moe.slots import LayerUse, allocate_slots, expected_loads, measured_loads

from .routing import ar1_trace


def adapmoe(t: int, single: float, accuracy: float) -> float:
    """The cost of t slots in AdapMoE's own terms: 8 experts, one or two of them active.

    Of two, both are absent with probability (8 - t)(7 - t)/56 and one with 2 t (8 - t)/56; a
    right prefetch saves one load.
    """
    both, one = (8 - t) * (7 - t) / 56, 2 * t * (8 - t) / 56
    of_one = (1 - t / 8) * (1 - accuracy)
    of_two = 2 * both * (1 - accuracy) + both * accuracy + one * (1 - accuracy)
    return single * of_one + (1 - single) * of_two


SHARE = st.floats(0.0, 1.0)


@given(single=SHARE, accuracy=SHARE)
def test_for_8_experts_and_one_or_two_active_it_is_the_formula_of_adapmoe(
    single: float, accuracy: float
) -> None:
    got = expected_loads(LayerUse(8, {1: single, 2: 1.0 - single}, accuracy))
    want = [adapmoe(t, single, accuracy) for t in range(9)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), accuracy=SHARE, data=st.data())
def test_it_is_the_mean_over_all_draws_of_k_experts(
    n: int, accuracy: float, data: st.DataObject
) -> None:
    ks = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3, unique=True))
    weights = data.draw(
        st.lists(st.integers(1, 9), min_size=len(ks), max_size=len(ks)).map(np.array)
    )
    shares = dict(zip(ks, (weights / weights.sum()).tolist(), strict=True))
    got = expected_loads(LayerUse(n, shares, accuracy))
    for t in range(n + 1):
        want = 0.0
        for k, share in shares.items():
            draws = [sum(i >= t for i in draw) for draw in combinations(range(n), k)]
            want += share * math.fsum(m - accuracy * (m > 0) for m in draws) / len(draws)
        assert got[t] == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_more_slots_never_cost_more_and_all_slots_cost_nothing() -> None:
    for n, k, accuracy in product((1, 8, 64), (1, 2, 6), (0.0, 0.5, 1.0)):
        curve = expected_loads(LayerUse(n, {min(k, n): 1.0}, accuracy))
        assert (np.diff(curve) <= 1e-12).all()
        assert curve[-1] == 0.0
        assert curve[0] == pytest.approx(min(k, n) - accuracy)


def best_of_all(curves: list[list[float]], total: int, least: int) -> float:
    """Over every way to share out the slots."""
    ways = product(*(range(least, len(curve)) for curve in curves))
    return min(
        sum(curve[t] for curve, t in zip(curves, way, strict=True))
        for way in ways
        if sum(way) <= total
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), least=st.integers(0, 2))
def test_no_way_to_share_out_the_slots_is_better(data: st.DataObject, least: int) -> None:
    """Any curves: convex or not, falling or not."""
    loads = st.lists(st.integers(0, 30).map(lambda x: x / 4), min_size=least + 1, max_size=6)
    curves = data.draw(st.lists(loads, min_size=1, max_size=4))
    total = data.draw(st.integers(least * len(curves), 20))
    plan = allocate_slots(curves, total, least=least)
    assert sum(plan.slots) <= total
    assert min(plan.slots) >= least
    got = sum(curve[t] for curve, t in zip(curves, plan.slots, strict=True))
    assert got == best_of_all(curves, total, least)
    assert plan.loss == got


def test_layers_that_are_harder_to_predict_get_more_slots() -> None:
    """AdapMoE's setting: 8 experts, two at first and mostly one later, ever better prefetches."""
    layers = [
        LayerUse(8, {1: single, 2: 1.0 - single}, accuracy)
        for single, accuracy in ((0.0, 0.0), (0.1, 0.57), (0.3, 0.72), (0.9, 0.94))
    ]
    plan = allocate_slots(layers, 16)
    assert sum(plan.slots) == 16
    assert list(plan.slots) == sorted(plan.slots, reverse=True)
    curves = [expected_loads(layer).tolist() for layer in layers]
    assert plan.loss == pytest.approx(best_of_all(curves, 16, 0), rel=1e-12)


def test_a_measured_curve_is_the_loads_of_its_trace() -> None:
    trace = ar1_trace(3, layers=2, tokens=120, experts=8, top_k=2)
    curve = measured_loads(trace)
    assert curve.shape == (2, 9)
    np.testing.assert_array_equal(curve[:, 0], [2.0, 2.0])
    for layer in range(2):
        assert curve[layer, 8] == len(np.unique(trace.ids[layer])) / 120  # each is loaded once
    # A prefetch saves one load where there is one to save.
    saved = curve - measured_loads(trace, prefetch_accuracy=1.0)
    np.testing.assert_array_equal(saved[:, 0], [1.0, 1.0])
    mixed = measured_loads(trace, prefetch_accuracy=[0.0, 0.5])
    np.testing.assert_allclose(curve - mixed, saved * [[0.0], [0.5]], atol=1e-15)


def test_measured_and_expected_curves_agree_on_routing_without_memory_or_preference() -> None:
    """There the formula's model is true: the standard error of a mean of 4000 steps is 0.011."""
    trace = ar1_trace(5, tokens=4000, experts=8, top_k=2, memory=0.0, bias=0.0)
    for accuracy in (0.0, 0.6):
        got = measured_loads(trace, prefetch_accuracy=accuracy)[0]
        want = expected_loads(LayerUse(8, trace.active_share(0), accuracy))
        np.testing.assert_allclose(got[2:], want[2:], atol=0.045)


def test_measured_curves_share_out_better_where_layers_differ_in_their_routing() -> None:
    """Two layers of the same shape, one with memory: the formula cannot tell them apart."""
    jumpy = ar1_trace(1, tokens=600, experts=16, top_k=2, memory=0.0, bias=0.0)
    steady = ar1_trace(2, tokens=600, experts=16, top_k=2, memory=0.98, bias=0.0)
    both = dataclasses.replace(jumpy, ids=np.concatenate((jumpy.ids, steady.ids)), scores=None)
    curves = measured_loads(both)
    by_formula = allocate_slots(
        [LayerUse(16, both.active_share(layer)) for layer in range(2)], 16
    ).slots
    by_trace = allocate_slots(curves, 16)
    assert by_trace.loss < 0.95 * sum(curves[layer, t] for layer, t in enumerate(by_formula))
    assert by_trace.slots[0] > by_trace.slots[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, {1: 1.0}), ValueError, "experts: got 0, expected at least 1"),
        ((8, {}), ValueError, "active: got no share, expected one at least"),
        ((8, {9: 1.0}), ValueError, "active: got 9 experts, expected 0 to 8"),
        ((8, {1: -0.5, 2: 1.5}), ValueError, "active[1]: got -0.5, expected 0 or more"),
        ((8, {1: float("nan")}), ValueError, "active[1]: got nan, expected 0 or more"),
        ((8, {1: 0.5, 2: 0.4}), ValueError, "active: got shares that sum to 0.9, expected 1"),
        ((8, {1.5: 1.0}), TypeError, "active: got float 1.5, expected int"),
        ((8, {1: 1.0}, 1.5), ValueError, "prefetch_accuracy: got 1.5, expected 0.0 to 1.0"),
        ((8, {1: 1.0}, float("nan")), ValueError, "prefetch_accuracy: got nan, expected"),
    ],
    ids=str,
)
def test_a_use_that_cannot_be_is_refused(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        LayerUse(*arguments)
    assert str(caught.value).startswith(message)


USE = LayerUse(8, {2: 1.0})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], 3), {}, ValueError, "layers: got none, expected one at least"),
        (([USE], -1), {}, ValueError, "total: got -1, expected at least 0"),
        (([USE], 2.5), {}, TypeError, "total: got float 2.5, expected int"),
        (([USE, USE], 1), {"least": 1}, ValueError, "total: got 1, expected at least 1 for each"),
        (([USE], 20), {"least": 9}, ValueError, "layers[0].shape: got (9,), expected (slots + 1,)"),
        (([USE, []], 2), {}, ValueError, "layers[1].shape: got (0,), expected (slots + 1,)"),
        (([[[1.0]]], 2), {}, ValueError, "layers[0].shape: got (1, 1), expected (slots + 1,)"),
        (([[1.0, float("nan")]], 2), {}, ValueError, "layers[0]: got a number that is not finite"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_is_refused(
    arguments: Any, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        allocate_slots(*arguments, **options)
    assert str(caught.value).startswith(message)


def test_an_accuracy_out_of_range_is_refused() -> None:
    trace = ar1_trace(3, tokens=10, experts=4, top_k=1)
    with pytest.raises(ValueError, match=r"prefetch_accuracy: got 1\.5, expected 0\.0 to 1\.0"):
        measured_loads(trace, prefetch_accuracy=1.5)
