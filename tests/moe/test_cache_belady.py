"""The clairvoyant bound against exhaustive search, and against every policy."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quernstone.moe.cache import POLICIES, Belady, Policy, make_cache

from .routing import ar1_trace


def fewest_loads(future: list[list[int]], slots: int) -> int:
    """Over all choices of whom to evict and, after a step too large, whom to keep of it."""
    states = {frozenset[int](): 0}
    for step in future:
        needed = frozenset(step)
        following: dict[frozenset[int], int] = {}
        for resident, loads in states.items():
            others = sorted(resident - needed)
            stay = min(len(others), max(0, slots - len(needed)))
            kept = combinations(sorted(needed), min(slots, len(needed)))
            for own, rest in product(kept, combinations(others, stay)):
                after = frozenset(own + rest)
                total = loads + len(needed - resident)
                following[after] = min(total, following.get(after, total))
        states = following
    return min(states.values())


def loads_of(policy: Policy, future: list[list[int]], slots: int) -> int:
    cache = make_cache(policy, slots, top_k=2, future=future)
    uniform = np.full(6, 1 / 6)
    return sum(len(cache.step(step, uniform).misses) for step in future)


STEPS = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1, max_size=14
)


@settings(max_examples=300, deadline=None)
@given(future=STEPS, slots=st.integers(0, 5))
@example(future=[[0, 1], [2, 3], [0, 4], [1, 2], [3, 0]], slots=3)
@example(future=[[0, 1, 2], [0, 1, 2], [0, 2]], slots=2)
def test_no_choice_of_evictions_loads_fewer_experts(future: list[list[int]], slots: int) -> None:
    assert loads_of("belady", future, slots) == fewest_loads(future, slots)


def test_no_choice_of_evictions_loads_fewer_experts_of_a_router() -> None:
    trace = ar1_trace(5, tokens=60, experts=7, top_k=2, memory=0.5)
    future = trace.ids[0].astype(int).tolist()
    for slots in range(1, 7):
        assert loads_of("belady", future, slots) == fewest_loads(future, slots)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "belady"])
@settings(max_examples=60, deadline=None)
@given(future=STEPS, slots=st.integers(0, 5))
def test_no_policy_is_above_the_bound(policy: Policy, future: list[list[int]], slots: int) -> None:
    assert loads_of(policy, future, slots) >= loads_of("belady", future, slots)


def test_the_furthest_next_use_gives_way() -> None:
    future = [[0, 1, 2], [3], [1], [0], [2]]
    cache = Belady(3, future)
    cache.step([0, 1, 2])
    assert cache.step([3]).evicted == (2,)


def test_what_is_not_needed_again_gives_way_first() -> None:
    future = [[0, 1], [2], [0]]
    cache = Belady(2, future)
    cache.step([0, 1])
    assert cache.step([2]).evicted == (1,)


def test_a_step_that_was_not_foretold_is_refused() -> None:
    cache = Belady(2, [[0, 1], [2]])
    cache.step([1, 0])
    with pytest.raises(ValueError, match=r"experts: got \[3\] in step 1, expected \[2\]"):
        cache.step([3])
    cache.step([2])
    with pytest.raises(ValueError, match="in step 2, expected none"):
        cache.step([2])


def test_the_bound_refuses_prefetches_and_pins() -> None:
    cache = Belady(2, [[0, 1]])
    with pytest.raises(ValueError, match="expert: got 3 to prefetch, expected none"):
        cache.insert(3)
    with pytest.raises(ValueError, match="expert: got 3 to pin, expected none"):
        cache.pin(3)


def test_after_a_step_that_is_too_large_those_needed_first_are_kept() -> None:
    cache = Belady(2, [[4, 0], [0, 1, 2], [3], [2], [1]])
    cache.step([4, 0])
    result = cache.step([0, 1, 2])
    assert (result.hits, result.misses) == ((0,), (1, 2))
    assert result.evicted == (4, 0)
    assert cache.resident == {1, 2}
