"""The rule of each policy, on steps small enough to follow by hand or by a formula."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quernstone.moe.cache import ARC, LFRU, LFU, LRU, MRS, S3FIFO, ExpertCache

from .routing import ar1_scores


def evicted_by(cache: ExpertCache, *steps: list[int]) -> list[tuple[int, ...]]:
    return [cache.step(step).evicted for step in steps]


def test_lru_evicts_by_last_use_and_within_a_step_by_its_order() -> None:
    cache = LRU(4)
    assert evicted_by(cache, [3, 1], [0, 2], [1], [5], [6]) == [(), (), (), (3,), (0,)]


def test_lru_takes_a_prefetch_for_a_use() -> None:
    cache = LRU(2)
    cache.step([0])
    cache.insert(1)
    cache.arrived(1)
    assert evicted_by(cache, [2]) == [(0,)]


def test_lfu_counts_steps_and_breaks_ties_by_recency() -> None:
    cache = LFU(3)
    assert evicted_by(cache, [0, 1], [0, 2], [0], [3], [4]) == [(), (), (), (1,), (2,)]


def test_lfu_remembers_what_it_evicted() -> None:
    """3 has been used twice when it comes back; without memory it is as new as 4."""
    steps = [[3], [3], [0, 1], [0, 1], [0], [1], [3], [4]]
    assert evicted_by(LFU(2), *steps)[-1] == (1,)
    assert evicted_by(LFU(2, remember=False), *steps)[-1] == (3,)


def test_lfu_lets_the_past_fade() -> None:
    steps = [[0], [0], [0], [0], [1], [1], [1], [2]]
    assert evicted_by(LFU(2), *steps)[-1] == (1,)
    assert evicted_by(LFU(2, halve_every=2), *steps)[-1] == (0,)


def test_lfru_divides_uses_since_loading_by_age() -> None:
    """0 has 3 uses, the last in the third step: 3/3 in the fifth, 3/4 in the sixth, 3/5 in the
    seventh. What was used once a step ago has 1/2, what was used three times 3/2."""
    assert evicted_by(LFRU(2), [0], [0], [0], [2], [1], [3])[-2:] == [(2,), (1,)]
    assert evicted_by(LFRU(2), [0], [0], [0], [2], [2], [2], [1])[-1] == (0,)


def test_s3fifo_evicts_what_was_used_once_before_what_was_used_again() -> None:
    """Ten slots, one on probation: until something is evicted, the overflow goes to main."""
    cache = S3FIFO(10)
    evicted_by(cache, *[[i] for i in range(10)])
    assert evicted_by(cache, [10]) == [(0,)]  # the only one on probation, unused
    assert evicted_by(cache, [11]) == [(10,)]
    assert evicted_by(cache, [11], [11], [12]) == [(), (), (1,)]  # 11 moves to main: 1 is oldest
    assert evicted_by(cache, [10]) == [(12,)]  # 10 comes back from its ghost, into main


def test_s3fifo_lets_a_used_expert_of_main_go_round() -> None:
    cache = S3FIFO(10)
    evicted_by(cache, *[[i] for i in range(10)], [1], [10], [10], [10])
    assert evicted_by(cache, [11]) == [(2,)]
    assert {1, 10} <= cache.resident


def test_arc_keeps_what_was_used_twice_through_a_scan() -> None:
    cache = ARC(4)
    evicted_by(cache, [0], [1], [0], [1])
    evicted_by(cache, *[[i] for i in range(10, 40)])
    assert {0, 1} <= cache.resident


def recent(scores: NDArray[np.float64], alpha: float, keep: int) -> NDArray[np.float64]:
    """S of MRS after each step, from the formula."""
    total = np.zeros(scores.shape[1])
    history = []
    for row in scores:
        floor = np.sort(row)[-keep]
        total = alpha * np.where(row >= floor, row, 0.0) + (1 - alpha) * total
        history.append(total)
    return np.array(history)


@pytest.mark.parametrize(("alpha", "top_k"), [(0.5, 2), (0.1, 3), (1.0, 1)])
def test_mrs_evicts_the_smallest_recent_score(alpha: float, top_k: int) -> None:
    scores = ar1_scores(2, tokens=400, experts=16)[0]
    history = recent(scores, alpha, 2 * top_k)
    cache = MRS(6, top_k=top_k, alpha=alpha)
    evictions = 0
    for row, now in zip(scores, history, strict=True):
        step = np.argsort(-row)[:top_k].tolist()
        candidates = cache.resident - set(step)
        evicted = set(cache.step(step, row).evicted)
        for key in evicted:
            assert now[key] <= min(now[other] for other in candidates - evicted)
        evictions += len(evicted)
    assert evictions > 50


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mrs_takes_all_tokens_of_a_step_and_top_p_of_each(reduction: str) -> None:
    rows = np.array([[0.6, 0.3, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7]])
    cache = MRS(4, top_k=1, alpha=0.5, reduction=reduction)  # type: ignore[arg-type]
    cache.step([0, 3], rows)
    total = np.array([0.6, 0.3, 0.2, 0.7]) * (0.25 if reduction == "mean" else 0.5)
    assert [cache._value(key) for key in range(4)] == pytest.approx(total.tolist(), rel=1e-15)
    cache.step([0], np.array([0.0, 0.0, 0.0, 1.0]))
    total = total / 2 + np.array([0.0, 0.0, 0.0, 0.5])
    assert [cache._value(key) for key in range(4)] == pytest.approx(total.tolist(), rel=1e-15)


def test_mrs_keeps_the_first_of_equal_scores() -> None:
    cache = MRS(4, top_k=1, alpha=1.0)
    cache.step([0], np.array([0.1, 0.2, 0.2, 0.2, 0.3]))
    assert [cache._value(key) for key in range(5)] == [0.0, 0.2, 0.0, 0.0, 0.3]


def test_mrs_scores_each_layer_by_itself() -> None:
    """A step of one layer leaves the scores of another as they are, whatever its own say."""
    cache = MRS(3, top_k=1, alpha=0.5)
    cache.step([1], np.array([0.1, 0.9]), first=0)
    cache.step([3], np.array([0.4, 0.6]), first=2)
    assert [cache._value(key) for key in range(4)] == pytest.approx([0.05, 0.45, 0.2, 0.3])
    cache.step([2], np.array([0.9, 0.1]), first=2)
    assert cache.step([2], np.array([0.9, 0.1]), first=2).evicted == ()
    assert cache.step([0], np.array([0.5, 0.5]), first=0).evicted == (3,)
