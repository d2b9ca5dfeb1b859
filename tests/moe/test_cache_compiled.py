"""The compiled replay against the classes that say what each policy does, hit for hit."""

from typing import Any

import numpy as np
import pytest

from quernstone import _core
from quernstone.moe.cache import LRU, POLICIES, Policy
from quernstone.moe.replay import _compiled, drive, replay, replay_in_python
from quernstone.moe.stream import Stream, layer_stream, shared_stream
from quernstone.moe.trace import Trace

from .routing import ar1_trace

OPTIONS: list[tuple[Policy, dict[str, Any]]] = [
    *((policy, {}) for policy in POLICIES),
    ("lfu", {"remember": False}),
    ("lfu", {"halve_every": 7}),
    ("lfu", {"remember": False, "halve_every": 7}),
    ("mrs", {"alpha": 0.1, "reduction": "sum"}),
    ("mrs", {"top_k": 1}),
]


def compiled(stream: Stream, policy: Policy, slots: int, options: dict[str, Any]) -> np.ndarray:
    return _compiled(stream, policy, options)(slots)


TRACES = {
    "tokens": ar1_trace(11, layers=2, tokens=400, experts=24, top_k=4),
    "batches": ar1_trace(12, layers=2, tokens=500, experts=24, top_k=3, batches=True),
    "one expert": ar1_trace(13, layers=2, tokens=60, experts=1, top_k=1),
}


@pytest.mark.parametrize(("policy", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("trace", TRACES)
def test_every_request_hits_where_it_hits_in_python(
    policy: Policy, options: dict[str, Any], trace: str
) -> None:
    """Slots from none, through fewer than a step has, to enough for all; and a shared cache."""
    streams = [
        (layer_stream(TRACES[trace], 1), (0, 1, 2, 3, 6, 11, 20, 24)),
        (shared_stream(TRACES[trace]), (4, 13, 30)),
    ]
    for stream, sizes in streams:
        for slots in sizes:
            want = replay_in_python(stream, policy, slots, options)
            got = compiled(stream, policy, slots, options)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("policy", POLICIES)
def test_long_skewed_traces_hit_alike(policy: Policy) -> None:
    """Frequent ghosts, rounds of main and ties: experts of very different popularity."""
    rng = np.random.default_rng(5)
    popularity = np.arange(1, 41.0) ** -0.8
    scores = popularity * rng.gamma(0.5, size=(1, 1500, 40)) + 1e-6
    trace = Trace.of((scores / scores.sum(axis=2, keepdims=True)).astype(np.float16), 2)
    stream = layer_stream(trace, 0)
    for slots in (3, 10, 25):
        np.testing.assert_array_equal(
            compiled(stream, policy, slots, {}), replay_in_python(stream, policy, slots, {})
        )


def test_replay_takes_the_compiled_way_for_a_name() -> None:
    trace = TRACES["tokens"]
    curve = replay(trace, "arc", [5, 9])
    for row, slots in enumerate((5, 9)):
        for layer in range(2):
            hits = compiled(layer_stream(trace, layer), "arc", slots, {}).sum()
            assert curve.hits[row, layer] == hits


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"reduction": "max"}, {"top_k": 0}], ids=str)
def test_options_are_checked_in_the_compiled_way_too(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        replay(TRACES["tokens"], "mrs", 5, **options)


def test_an_option_of_another_policy_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        replay(TRACES["tokens"], "lru", 5, alpha=0.5)


GOOD: dict[str, Any] = {
    "policy": "lru",
    "slots": 2,
    "keys": 8,
    "needed": np.array([0, 1, 4, 5]),
    "offsets": np.array([0, 2, 4]),
    "first": np.array([0, 4]),
}
SCORES = np.full((2, 4), 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fifo"}, "policy: got fifo, expected a policy"),
        ({"slots": -1}, "slots: got -1, expected at least 0"),
        ({"needed": np.array([0, 1, 4, 8])}, "needed: got 8, expected 0 or more and below 8"),
        ({"needed": np.array([0, -1, 4, 5])}, "needed: got -1, expected 0 or more and below 8"),
        ({"needed": np.array([0, 0, 4, 5])}, "needed: got 0, expected each key once in a step"),
        ({"needed": np.zeros((2, 2), np.int64)}, "needed.ndim: got 2, expected 1"),
        ({"offsets": np.array([0, 4])}, "offsets.shape[0]: got 2, expected one more than the"),
        ({"offsets": np.array([0, 2, 3])}, "offsets[-1]: got 3, expected from 0 to 4"),
        ({"offsets": np.array([1, 2, 4])}, "offsets[-1]: got 4, expected from 0 to 4"),
        ({"offsets": np.array([0, 5, 4])}, "offsets: got 4, expected at least 5"),
        ({"policy": "belady"}, "next.shape[0]: got 0, expected needed.shape[0] = 4"),
        ({"policy": "mrs"}, "scores.shape[0]: got 0, expected the steps, 2"),
        ({"policy": "mrs", "scores": SCORES[:1]}, "scores.shape[0]: got 1, expected the steps, 2"),
        ({"policy": "mrs", "scores": SCORES[:, :0]}, "scores.shape[1]: got 0, expected at least 1"),
        (
            {"policy": "mrs", "scores": SCORES, "first": np.array([0, 8])},
            "first: got 8, expected a layer within keys = 8",
        ),
        (
            {"policy": "mrs", "scores": SCORES, "first": np.array([0, 2])},
            "first: got 2, expected a layer within keys = 8",
        ),
        (
            {"policy": "reuse", "scores": SCORES, "first": np.array([0, 0])},
            "needed: got 4, expected a key of the layer that begins at 0",
        ),
    ],
    ids=str,
)
def test_the_core_reads_nothing_by_a_key_or_offset_out_of_range(
    changes: dict[str, Any], message: str
) -> None:
    assert _core.moe.replay_cache(**GOOD).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        _core.moe.replay_cache(**(GOOD | changes))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_slots_than_experts_are_as_many(policy: Policy) -> None:
    stream = layer_stream(TRACES["tokens"], 0)
    want = compiled(stream, policy, stream.experts, {})
    for slots in (stream.experts + 1, 2**62, 2**63 - 1, 2**63):
        np.testing.assert_array_equal(compiled(stream, policy, slots, {}), want)
    keys, ends, first = np.array([0, 1]), np.array([0, 1, 2]), np.zeros(2, np.int64)
    hit = _core.moe.replay_cache("arc", 2**63 - 1, 2, keys, ends, first)
    assert hit.tolist() == [0, 0]


def test_a_trace_without_steps_has_no_hits() -> None:
    none = np.zeros(0, np.int64)
    assert not len(_core.moe.replay_cache("arc", 2, 8, none, np.zeros(1, np.int64), none))


def test_drive_gives_one_flag_for_each_request() -> None:
    stream = layer_stream(TRACES["batches"], 0)
    assert drive(stream, LRU(24)).shape == stream.keys.shape
