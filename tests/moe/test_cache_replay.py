"""Traces through caches: what is counted, of which layer, and what share of the gap closes."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from quernstone.moe.cache import LRU, POLICIES, Belady, Policy, make_cache
from quernstone.moe.replay import HitCurve, gap_closed, replay
from quernstone.moe.stream import layer_stream, shared_stream
from quernstone.moe.trace import Trace

from .routing import ar1_trace

TRACE = ar1_trace(1, layers=3, tokens=150, experts=16, top_k=3)
BATCHES = ar1_trace(2, layers=3, tokens=150, experts=16, top_k=3, batches=True)


def steps_of(trace: Trace, layer: int) -> list[list[int]]:
    """Token by token in plain Python."""
    steps: list[dict[int, None]] = [{} for _ in range(trace.number_of_steps)]
    for token, step in enumerate(trace.steps.tolist()):
        for key in trace.ids[layer, token].tolist():
            if key >= 0:
                steps[step][key] = None
    return [list(step) for step in steps]


def with_fewer(trace: Trace) -> Trace:
    """Every third token without its last expert."""
    ids = trace.ids.copy()
    ids[:, ::3, -1] = -1
    return dataclasses.replace(trace, ids=ids)


@pytest.mark.parametrize("trace", [TRACE, BATCHES, with_fewer(BATCHES)], ids=["", "batch", "few"])
def test_a_layer_s_stream_has_each_step_s_experts_once_and_in_order(trace: Trace) -> None:
    for layer in range(trace.layers):
        assert list(layer_stream(trace, layer)) == steps_of(trace, layer)


@pytest.mark.parametrize("trace", [TRACE, BATCHES, with_fewer(BATCHES)], ids=["", "batch", "few"])
def test_in_a_shared_stream_the_layers_take_turns(trace: Trace) -> None:
    stream = shared_stream(trace)
    want = []
    for step in zip(*(steps_of(trace, layer) for layer in range(trace.layers)), strict=True):
        want += [[16 * layer + key for key in keys] for layer, keys in enumerate(step)]
    assert list(stream) == want
    assert stream.first_keys().tolist() == [0, 16, 32] * trace.number_of_steps


@pytest.mark.parametrize("trace", [TRACE, BATCHES], ids=["", "batch"])
def test_the_next_step_of_each_request(trace: Trace) -> None:
    for stream in (layer_stream(trace, 1), shared_stream(trace)):
        steps = list(stream)
        want = [
            next((j for j in range(i + 1, len(steps)) if key in steps[j]), len(steps))
            for i, step in enumerate(steps)
            for key in step
        ]
        assert stream.next_steps().tolist() == want


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trace", [TRACE, BATCHES], ids=["", "batch"])
def test_every_layer_is_replayed_in_a_cache_of_its_own(policy: Policy, trace: Trace) -> None:
    curve = replay(trace, policy, [2, 5, 16])
    assert trace.scores is not None
    bounds = np.searchsorted(trace.steps, np.arange(trace.number_of_steps + 1))
    for layer in range(trace.layers):
        steps = steps_of(trace, layer)
        assert curve.requests[layer] == sum(map(len, steps))
        for row, slots in enumerate((2, 5, 16)):
            cache = make_cache(policy, slots, top_k=3, future=steps)
            misses = [
                len(cache.step(step, trace.scores[layer, bounds[i] : bounds[i + 1]]).misses)
                for i, step in enumerate(steps)
            ]
            assert curve.hits[row, layer] == curve.requests[layer] - sum(misses)
            assert curve.stalls[row, layer] == sum(map(bool, misses))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_cache_holds_experts_of_all_layers(policy: Policy) -> None:
    curve = replay(BATCHES, policy, 12, shared=True)
    assert BATCHES.scores is not None
    bounds = np.searchsorted(BATCHES.steps, np.arange(BATCHES.number_of_steps + 1))
    keys = list(shared_stream(BATCHES))
    cache = make_cache(policy, 12, top_k=3, future=keys)
    hits = [0, 0, 0]
    for i, step in enumerate(keys):
        number, layer = divmod(i, 3)
        scores = BATCHES.scores[layer, bounds[number] : bounds[number + 1]]
        hits[layer] += len(cache.step(step, scores, first=16 * layer).hits)
    assert curve.hits.tolist() == [hits]


def test_layers_may_have_slots_of_their_own() -> None:
    curve = replay(TRACE, "lru", [(2, 5, 9), 5])
    assert curve.slots == ((2, 5, 9), 5)
    each = replay(TRACE, "lru", [2, 5, 9])
    assert curve.hits[0].tolist() == each.hits.diagonal().tolist()
    assert curve.hits[1].tolist() == each.hits[1].tolist()


def test_a_cache_of_another_kind_may_be_replayed() -> None:
    class Own(LRU):
        pass

    assert replay(TRACE, Own, 5).hits.tolist() == replay(TRACE, "lru", 5).hits.tolist()
    assert replay(TRACE, Own, 5).policy == "Own"


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_an_expert_misses_only_once(policy: Policy) -> None:
    curve = replay(TRACE, policy, 16)
    for layer in range(3):
        used = len(np.unique(TRACE.ids[layer]))
        assert curve.requests[layer] - curve.hits[0, layer] == used


def test_rates_are_shares_of_the_requests() -> None:
    curve = replay(TRACE, "lru", [0, 5])
    assert curve.rate.tolist() == [0.0, curve.hits[1].sum() / curve.requests.sum()]
    assert curve.layer_rate[1].tolist() == (curve.hits[1] / curve.requests).tolist()


def test_options_reach_the_policy() -> None:
    plain, aged = replay(TRACE, "lfu", 5), replay(TRACE, "lfu", 5, halve_every=3)
    assert plain.hits.tolist() != aged.hits.tolist()
    assert (
        replay(TRACE, "mrs", 5).hits.tolist() != replay(TRACE, "mrs", 5, alpha=0.05).hits.tolist()
    )


def curve(*rates: float) -> HitCurve:
    hits = (1000 * np.array(rates)).round().astype(np.int64)[:, None]
    zeros = np.zeros_like(hits)
    return HitCurve("x", tuple(range(len(rates))), hits, zeros, np.array([1000]), 10)


def test_the_gap_closed_is_0_for_lru_and_1_for_the_bound() -> None:
    lru, belady = curve(0.5, 0.6), curve(0.7, 0.8)
    assert gap_closed(lru, belady, lru).tolist() == [0.0, 0.0]
    assert gap_closed(lru, belady, belady).tolist() == [1.0, 1.0]
    assert gap_closed(lru, belady, curve(0.55, 0.5)).tolist() == pytest.approx([0.25, -0.5])


def test_without_a_gap_there_is_no_share_of_it() -> None:
    closed = gap_closed(curve(0.5, 0.6), curve(0.5, 0.8), curve(0.5, 0.7)).tolist()
    assert math.isnan(closed[0])
    assert closed[1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("belady", "policy", "message"),
    [
        (curve(0.7), curve(0.5, 0.6), "belady.slots: got (0,), expected (0, 1) as of lru"),
        (curve(0.7, 0.7), curve(0.5), "policy.slots: got (0,), expected (0, 1) as of lru"),
        (
            curve(0.7, 0.7),
            dataclasses.replace(curve(0.5, 0.6), requests=np.array([900])),
            "policy.requests: got 900, expected 1000 as of lru: another trace",
        ),
    ],
    ids=["belady", "policy", "trace"],
)
def test_curves_that_do_not_belong_together_are_refused(
    belady: HitCurve, policy: HitCurve, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        gap_closed(curve(0.5, 0.6), belady, policy)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"policy": "fifo", "slots": 3}, ValueError, "policy: got 'fifo', expected one of lru"),
        ({"policy": "lru", "slots": []}, ValueError, "slots: got none, expected one"),
        ({"policy": "lru", "slots": -1}, ValueError, "slots[0]: got -1, expected at least 0"),
        ({"policy": "lru", "slots": "16"}, TypeError, "slots[0]: got str '16', expected int"),
        ({"policy": "lru", "slots": [3, 2.5]}, TypeError, "slots[1]: got float 2.5, expected"),
        (
            {"policy": "lru", "slots": [3, (1, 2)]},
            ValueError,
            "slots[1]: got 2 numbers, expected 3, one a layer",
        ),
        (
            {"policy": "lru", "slots": [(1, 2, 3)], "shared": True},
            ValueError,
            "slots[0]: got 3 numbers, expected one number: the layers share",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_replayed_is_refused(
    call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        replay(TRACE, **call)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("policy", ["mrs", "reuse"])
def test_a_policy_that_goes_by_scores_refuses_a_trace_without(policy: Policy) -> None:
    bare = dataclasses.replace(TRACE, scores=None)
    with pytest.raises(ValueError, match=rf"trace\.scores: got None, expected .*{policy}"):
        replay(bare, policy, 3)
    replay(bare, "lru", 3)


def test_the_bound_is_above_every_policy_at_every_size() -> None:
    sizes = list(range(17))
    for trace in (TRACE, BATCHES):
        bound = replay(trace, "belady", sizes).hits
        for policy in POLICIES:
            assert (replay(trace, policy, sizes).hits <= bound).all()
    assert isinstance(make_cache("belady", 1, future=[]), Belady)
