"""The learned policy: its equations, what it learns, and its edges."""

import numpy as np
import pytest

from quernstone.moe.cache import ExpectedReuse
from quernstone.moe.cache.reuse import (
    DISCOUNT,
    FEATURES,
    FLOOR,
    MEMORY,
    RATES,
    RIDGE,
    USE_RATE,
    _Layer,
    _solve,
)

from .routing import ar1_scores


def average(x: np.ndarray, rate: float) -> np.ndarray:
    """[s, e]: the moving average after each step, the plain mean as long as that weighs less."""
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        weight = max(rate, 1 / (i + 1))
        out[i] = weight * row + (1 - weight) * (out[i - 1] if i else 0.0)
    return out


def test_its_weights_solve_the_temporal_difference_equation() -> None:
    """Features and sums made at once from the whole history, solved by LAPACK."""
    steps, experts = 120, 16
    scores = ar1_scores(7, tokens=steps, experts=experts)[0]
    used = np.zeros((steps, experts))
    np.put_along_axis(used, np.argsort(-scores, axis=1)[:, :3], 1.0, axis=1)
    logs = np.log(experts * scores + FLOOR)
    last = np.where(used > 0, np.arange(steps)[:, None], -np.inf)
    age = np.arange(steps)[:, None] - np.maximum.accumulate(last, axis=0)
    columns = [np.ones_like(logs), *(average(logs, rate) for rate in RATES)]
    columns += [average(used, USE_RATE), 1 / (1 + age)]
    x = np.stack(columns, axis=2)  # [s, e, f]

    weight = MEMORY ** np.arange(steps - 2, -1, -1)
    difference = x[:-1] - DISCOUNT * x[1:]
    matrix = np.einsum("s,sef,seg->fg", weight, x[:-1], difference)
    right = np.einsum("s,sef,se->f", weight, x[:-1], used[1:])
    want = np.linalg.solve(matrix + RIDGE * np.eye(FEATURES), right)

    layer = _Layer(experts)
    for row, now in zip(logs, used, strict=True):
        values = layer.step(np.flatnonzero(now).tolist(), row)
    np.testing.assert_allclose(layer._weights, want, rtol=1e-7)
    np.testing.assert_allclose(values, x[-1] @ want, rtol=1e-7)


def test_it_expects_the_uses_that_come() -> None:
    """Of experts used independently with a fixed probability each, V is p / (1 - DISCOUNT)."""
    rng = np.random.default_rng(1)
    probability = np.linspace(0.05, 0.6, 12)
    layer = _Layer(12)
    for _ in range(4000):
        values = layer.step(
            np.flatnonzero(rng.random(12) < probability).tolist(),
            np.log(12 * probability / probability.sum() + FLOOR),
        )
    np.testing.assert_allclose(values, probability / (1 - DISCOUNT), atol=0.8)


def test_it_evicts_the_smallest_value() -> None:
    scores = ar1_scores(3, tokens=300, experts=16)[0]
    cache = ExpectedReuse(5)
    evictions = 0
    for row in scores:
        step = np.argsort(-row)[:2].tolist()
        candidates = cache.resident - set(step)
        evicted = set(cache.step(step, row).evicted)
        for key in evicted:
            assert cache._value(key) <= min(cache._value(other) for other in candidates - evicted)
        evictions += len(evicted)
    assert evictions > 50


def test_layers_of_a_shared_cache_learn_apart() -> None:
    """What a layer's experts are worth is the same as in a cache of their own."""
    scores = ar1_scores(4, layers=2, tokens=80, experts=8)
    alone, shared = ExpectedReuse(4), ExpectedReuse(9)
    for first, second in zip(*scores, strict=True):
        step = np.argsort(-second)[:2].tolist()
        alone.step(step, second)
        shared.step(np.argsort(-first)[:3].tolist(), first, first=0)
        shared.step([8 + key for key in step], second, first=8)
    assert [alone._value(key) for key in range(8)] == [shared._value(8 + key) for key in range(8)]


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_values_stay_finite_where_there_is_nothing_to_learn(experts: int, constant: bool) -> None:
    rng = np.random.default_rng(0)
    cache = ExpectedReuse(1)
    for _ in range(500):
        scores = np.full(experts, 1 / experts) if constant else rng.dirichlet(np.ones(experts))
        cache.step([0], scores)
        assert np.isfinite([cache._value(key) for key in range(experts)]).all()


def test_a_singular_matrix_is_not_solved() -> None:
    assert _solve(np.array([[1.0, 2.0], [2.0, 4.0]]), np.ones(2)) is None


def test_elimination_takes_the_pivot_that_is_furthest_from_zero() -> None:
    assert _solve(np.array([[0.0, 2.0], [-4.0, 0.0]]), np.array([2.0, 4.0])) == [-1.0, 1.0]
    tiny = np.array([[1e-20, 1.0], [-1.0, 1.0]])  # a pivot of 1e-20 would give 0, 1
    assert _solve(tiny, np.array([1.0, 3.0])) == pytest.approx([-2.0, 1.0], rel=1e-12)


def test_a_layer_does_not_change_its_number_of_experts() -> None:
    cache = ExpectedReuse(2)
    cache.step([0], np.full(4, 0.25))
    with pytest.raises(ValueError, match=r"scores\.shape: got 5 experts, expected 4"):
        cache.step([0], np.full(5, 0.2))


def test_a_key_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match="experts: got 4, expected 8 to 11 as scored"):
        ExpectedReuse(2).step([9, 4], np.full(4, 0.25), first=8)
