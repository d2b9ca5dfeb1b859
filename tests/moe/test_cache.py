"""What every cache of experts promises, whatever its policy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quernstone.moe.cache import NEED_SCORES, POLICIES, ExpertCache, Policy, make_cache

EXPERTS = 8
ONLINE = [policy for policy in POLICIES if policy != "belady"]
UNIFORM = np.full(EXPERTS, 1 / EXPERTS)


def cache_of(policy: Policy, slots: int, **options: Any) -> ExpertCache:
    return make_cache(policy, slots, top_k=2, **options)


class Model:
    """The rules of the interface in sets, to hold a cache to whatever it evicts."""

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.resident: set[int] = set()
        self.in_flight: set[int] = set()
        self.pinned: set[int] = set()
        self.in_use: set[int] = set()

    def may_go(self) -> set[int]:
        return self.resident - self.in_flight - self.pinned - self.in_use

    def evict(self, evicted: tuple[int, ...]) -> None:
        for key in evicted:
            assert key in self.may_go()
            self.resident.remove(key)

    def step(self, keys: list[int], scores: NDArray[np.float64]) -> None:
        result = self.cache.step(keys, scores)
        needed = set(keys)
        self.in_use = needed
        assert set(result.hits) == needed & (self.resident - self.in_flight)
        assert set(result.arriving) == needed & self.in_flight
        assert set(result.misses) == needed - self.resident
        assert len(result.hits) + len(result.arriving) + len(result.misses) == len(needed)
        self.in_flight -= needed
        free = self.cache.slots - len(self.resident)
        room = free + len(self.may_go())
        kept = [key for key in result.misses if key not in result.streamed]
        assert len(kept) == min(room, len(result.misses))
        assert len(result.evicted) == max(0, len(kept) - free)
        self.evict(result.evicted)
        self.resident.update(kept)

    def insert(self, key: int) -> None:
        known = key in self.resident
        room = self.cache.slots > len(self.resident) or self.may_go()
        result = self.cache.insert(key)
        assert result.taken == bool(known or room)
        assert bool(result.evicted) == bool(
            not known and room and len(self.resident) == self.cache.slots
        )
        self.evict(result.evicted)
        if result.taken and not known:
            self.resident.add(key)
            self.in_flight.add(key)

    def check(self) -> None:
        assert self.cache.resident == self.resident
        assert self.cache.in_flight == self.in_flight
        assert self.cache.pinned == self.pinned
        assert len(self.resident) <= self.cache.slots


def keys() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, EXPERTS - 1), max_size=5)


OPERATIONS = st.one_of(
    st.tuples(st.just("step"), keys()),
    st.tuples(st.just("step"), keys()),
    st.tuples(st.just("insert"), st.integers(0, EXPERTS - 1)),
    st.tuples(st.sampled_from(["arrived", "cancel", "pin", "unpin"]), st.integers(0, EXPERTS - 1)),
    st.tuples(st.just("release"), st.just(0)),
)


@pytest.mark.parametrize("policy", ONLINE)
@settings(max_examples=60, deadline=None)
@given(slots=st.integers(0, 6), operations=st.lists(OPERATIONS, min_size=10, max_size=50))
def test_whatever_is_asked_of_it_a_cache_keeps_to_its_rules(
    policy: Policy, slots: int, operations: list[tuple[str, Any]]
) -> None:
    model = Model(cache_of(policy, slots))
    rng = np.random.default_rng(0)
    for name, argument in operations:
        if name == "step":
            model.step(argument, rng.dirichlet(np.ones(EXPERTS), 2))
        elif name == "insert":
            model.insert(argument)
        elif name == "arrived" and argument in model.resident:
            model.cache.arrived(argument)
            model.in_flight.discard(argument)
        elif name == "cancel" and argument in model.in_flight:
            model.cache.cancel(argument)
            model.in_flight.remove(argument)
            model.resident.remove(argument)
        elif name == "pin":
            model.cache.pin(argument)
            model.pinned.add(argument)
        elif name == "unpin":
            model.cache.unpin(argument)
            model.pinned.discard(argument)
        elif name == "release":
            model.cache.release()
            model.in_use.clear()
        model.check()


@pytest.mark.parametrize("policy", ONLINE)
def test_a_step_larger_than_the_cache_streams_the_rest_through(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    result = cache.step([5, 1, 4, 0], UNIFORM)
    assert result.misses == (5, 1, 4, 0)
    assert result.streamed == (4, 0)
    assert not result.evicted
    assert cache.resident == {5, 1}
    assert cache.step([0, 1], UNIFORM).hits == (1,)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_slots_everything_streams(policy: Policy) -> None:
    cache = cache_of(policy, 0, future=[[1, 2], [1]])
    assert cache.step([1, 2], UNIFORM).streamed == (1, 2)
    assert cache.step([1], UNIFORM) == ((), (1,), (), (), (1,))
    assert not cache.resident


@pytest.mark.parametrize("policy", ONLINE)
def test_without_slots_there_is_no_prefetch(policy: Policy) -> None:
    cache = cache_of(policy, 0)
    assert cache.insert(3) == (False, ())
    assert not cache.resident


@pytest.mark.parametrize("policy", ONLINE)
def test_experts_in_use_are_kept_until_the_step_is_released(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    cache.step([0, 1], UNIFORM)
    assert cache.insert(2) == (False, ())
    cache.release()
    taken, evicted = cache.insert(2)
    assert taken
    assert len(evicted) == 1


@pytest.mark.parametrize("policy", ONLINE)
def test_a_step_waits_for_what_is_in_flight_and_does_not_load_it_again(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    assert cache.insert(3) == (True, ())
    assert cache.in_flight == {3}
    result = cache.step([3, 4], UNIFORM)
    assert (result.arriving, result.misses, result.hits) == ((3,), (4,), ())
    assert not cache.in_flight
    assert cache.step([3], UNIFORM).hits == (3,)


@pytest.mark.parametrize("policy", ONLINE)
def test_an_arrived_prefetch_is_a_hit(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    cache.insert(3)
    cache.arrived(3)
    assert cache.step([3], UNIFORM).hits == (3,)


@pytest.mark.parametrize("policy", ONLINE)
def test_a_prefetch_in_flight_keeps_its_slot(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    cache.insert(3)
    for step in range(20):
        cache.step([4 + step % 3], UNIFORM)
        assert 3 in cache.resident
    cache.arrived(3)
    for step in range(40):
        cache.step([4 + step % 2, 6 + step % 2], UNIFORM)
    assert 3 not in cache.resident


@pytest.mark.parametrize("policy", ONLINE)
def test_a_refused_prefetch_changes_nothing(policy: Policy) -> None:
    """Two caches that differ by refused prefetches evict the same from then on."""
    rng = np.random.default_rng(3)
    plain, asked = cache_of(policy, 3), cache_of(policy, 3)
    for _ in range(300):
        step = rng.permutation(EXPERTS)[:3].tolist()
        scores = rng.dirichlet(np.ones(EXPERTS))
        assert plain.step(step, scores) == asked.step(step, scores)
        for key in range(EXPERTS):
            if key not in step:
                assert not asked.insert(key).taken


@pytest.mark.parametrize("policy", ONLINE)
def test_a_cancelled_prefetch_frees_its_slot(policy: Policy) -> None:
    cache = cache_of(policy, 1)
    cache.insert(3)
    assert cache.step([1], UNIFORM).streamed == (1,)
    cache.cancel(3)
    assert cache.step([1], UNIFORM).streamed == ()
    assert cache.resident == {1}


def random_steps(seed: int) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Skewed, so that some experts come back soon and others do not."""
    rng = np.random.default_rng(seed)
    weights = np.arange(EXPERTS, 0, -1.0) / np.arange(EXPERTS, 0, -1.0).sum()
    sizes = rng.integers(1, 3, 150)
    return [
        (rng.choice(EXPERTS, n, replace=False, p=weights).tolist(), rng.dirichlet(np.ones(EXPERTS)))
        for n in sizes
    ]


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("seed", range(5))
def test_a_cancelled_prefetch_leaves_no_trace(policy: Policy, seed: int) -> None:
    plain, prefetched = cache_of(policy, 4), cache_of(policy, 4)
    for key in range(4):
        prefetched.insert(key)
    for key in range(4):
        prefetched.cancel(key)
    for step, scores in random_steps(seed):
        assert prefetched.step(step, scores) == plain.step(step, scores)


@pytest.mark.parametrize(
    ("policy", "options"),
    [*((policy, {}) for policy in ONLINE), ("lfu", {"remember": False})],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_a_prefetch_that_is_used_is_worth_a_load_that_was(
    policy: Policy, options: dict[str, Any], seed: int
) -> None:
    """Fetching it is no use of its own: the first one is that of the step."""
    loaded, prefetched = cache_of(policy, 4, **options), cache_of(policy, 4, **options)
    steps = random_steps(seed)
    for key, (_, scores) in zip((0, 5, 2), steps, strict=False):
        prefetched.insert(key)
        prefetched.arrived(key)
        assert loaded.step([key], scores).misses == prefetched.step([key], scores).hits == (key,)
    for step, scores in steps:
        assert prefetched.step(step, scores) == loaded.step(step, scores)


@pytest.mark.parametrize("policy", ONLINE)
def test_a_pinned_expert_stays_however_little_it_is_used(policy: Policy) -> None:
    cache = cache_of(policy, 2)
    cache.step([0], UNIFORM)
    cache.pin(0)
    for step in range(30):
        cache.step([1 + step % 5], UNIFORM)
        assert 0 in cache.resident
    cache.unpin(0)
    for step in range(60):
        cache.step([1 + step % 5], UNIFORM)
    assert 0 not in cache.resident


@pytest.mark.parametrize("policy", ONLINE)
def test_repeated_keys_of_a_step_count_once(policy: Policy) -> None:
    once, twice = cache_of(policy, 3), cache_of(policy, 3)
    rng = np.random.default_rng(1)
    for _ in range(200):
        step = rng.integers(0, EXPERTS, 3).tolist()
        scores = rng.dirichlet(np.ones(EXPERTS))
        distinct = list(dict.fromkeys(step))
        assert once.step(distinct, scores) == twice.step(step + distinct, scores)


@pytest.mark.parametrize("policy", ONLINE)
def test_a_cache_of_all_layers_takes_keys_beyond_a_layer(policy: Policy) -> None:
    cache = cache_of(policy, 3)
    for layer in range(3):
        first = layer * EXPERTS
        cache.step([first + 2, first + 5], UNIFORM, first=first)
    assert len(cache.resident) == 3
    assert {18, 21} <= cache.resident


@pytest.mark.parametrize("policy", ONLINE)
def test_numpy_integers_are_keys(policy: Policy) -> None:
    cache = cache_of(policy, np.int64(2))  # type: ignore[arg-type]
    cache.step(np.array([1, 2], dtype=np.int16), UNIFORM)  # type: ignore[arg-type]
    assert cache.resident == {1, 2}
    assert all(type(key) is int for key in cache.resident)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.step([-1], UNIFORM), ValueError, "experts: got -1, expected at least 0"),
        (lambda c: c.step([1.0], UNIFORM), TypeError, "experts: got float 1.0, expected int"),
        (lambda c: c.step([True], UNIFORM), TypeError, "experts: got bool True, expected int"),
        (lambda c: c.insert("3"), TypeError, "expert: got str '3', expected int"),
        (lambda c: c.pin(-3), ValueError, "expert: got -3, expected at least 0"),
        (lambda c: c.arrived(3), ValueError, "expert: got 3, expected one that was inserted"),
        (lambda c: c.cancel(3), ValueError, "expert: got 3, expected one in flight"),
    ],
    ids=str,
)
def test_a_wrong_key_is_refused(call: Any, error: type[Exception], message: str) -> None:
    cache = cache_of("lru", 2)
    with pytest.raises(error) as caught:
        call(cache)
    assert str(caught.value) == message


@pytest.mark.parametrize("policy", sorted(NEED_SCORES))
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores: got None, expected"),
        (np.full((2, 3, 4), 0.1), "scores.shape: got (2, 3, 4), expected (tokens, experts)"),
        (np.zeros((0, EXPERTS)), "scores.shape: got (0, 8), expected"),
        ([float("nan")] * EXPERTS, "scores: got nan, expected finite numbers"),
        ([0.5] * 7 + [float("inf")], "scores: got inf, expected finite numbers"),
        ([0.5] * 7 + [-0.5], "scores: got -0.5, expected finite numbers, 0 or more"),
        (["a"] * EXPERTS, "scores.dtype: got <U1, expected a floating type"),
    ],
    ids=str,
)
def test_wrong_scores_are_refused(policy: Policy, scores: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        cache_of(policy, 2).step([1], scores)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("fifo", 2), ValueError, "policy: got 'fifo', expected one of lru, lfu"),
        (("lru", -1), ValueError, "slots: got -1, expected at least 0"),
        (("lru", 2.0), TypeError, "slots: got float 2.0, expected int"),
        (("mrs", 2), ValueError, "top_k: got None, expected"),
        (("belady", 2), ValueError, "future: got None, expected"),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_made_says_why(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        make_cache(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("mrs", {"alpha": 0.0}, "alpha: got 0.0, expected above 0 and at most 1"),
        ("mrs", {"alpha": 1.5}, "alpha: got 1.5"),
        ("mrs", {"reduction": "max"}, "reduction: got 'max', expected 'mean' or 'sum'"),
        ("lfu", {"halve_every": 0}, "halve_every: got 0, expected at least 1"),
    ],
)
def test_options_out_of_range_are_refused(
    policy: Policy, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        cache_of(policy, 2, **options)
    assert str(caught.value).startswith(message)


def test_mrs_refuses_a_top_k_below_one() -> None:
    with pytest.raises(ValueError, match="top_k: got 0, expected at least 1"):
        make_cache("mrs", 2, top_k=0)
