"""How far the heuristics are from the optimum, and what the optimum costs."""

import numpy as np
import pytest

from quernstone.bench.cases.moe import REGIMES, Regime
from quernstone.moe import Layer, schedule_layer
from quernstone.moe.schedule import Policy

INSTANCES = 1000
MEAN, WORST = 0.01, 0.05


def regrets(layers: list[Layer], policy: Policy) -> np.ndarray:
    found = [schedule_layer(layer, policy).makespan for layer in layers]
    best = [schedule_layer(layer, "exact").makespan for layer in layers]
    return np.array(found) / np.array(best) - 1


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_hybrid_is_within_a_percent_of_the_optimum(regime: Regime) -> None:
    regret = regrets(regime.layers(INSTANCES, seed=1), "hybrid")
    assert regret.min() >= 0
    assert regret.mean() <= MEAN
    assert regret.max() <= WORST


@pytest.mark.parametrize("flight", [False, True])
@pytest.mark.parametrize("n", [6, 12, 20, 64])
def test_costs_without_any_pattern_do_not_lead_hybrid_astray(n: int, flight: bool) -> None:
    rng = np.random.default_rng(n)
    layers = []
    for _ in range(100):
        ready = np.where(rng.random(n) < 0.5, 0.0, np.inf)
        if flight:
            ready = np.where(rng.random(n) < 0.3, 3 * rng.random(n), ready)
        loads = rng.integers(1, 64, n)
        times = (rng.random(n), rng.random(n), rng.random(n))
        layers.append(Layer(loads, ready, *times, cpu_first=rng.random() / 2))
    regret = regrets(layers, "hybrid")
    assert regret.mean() <= MEAN
    assert regret.max() <= WORST


def test_the_others_are_as_far_off_as_their_rules_make_them() -> None:
    """Times the optimum, of the regimes in which a rule can be worked out by hand."""
    by_name = {regime.name: regime.layers(200, seed=2) for regime in REGIMES}
    decode = by_name["decode8.hit25"]
    # Eight transfers overlap eight computations of 0.5; the optimum leaves two to the CPU: 3.
    assert regrets(decode, "gpu_only").mean() == pytest.approx(1 / 3, abs=0.02)
    assert regrets(decode, "fixed").mean() > 1.0
    slow = by_name["decode6.slow.hit25"]
    assert regrets(slow, "gpu_only").mean() > 2.0
    assert 0.05 < regrets(slow, "fixed").mean() < 0.2
    for policy in ("list", "event"):
        assert regrets(decode, policy).max() == 0.0
        assert regrets(slow, policy).max() == 0.0
    assert regrets(by_name["prefill12.skewed.hit50"], "list").max() > WORST


def test_the_optimum_of_many_equal_experts_is_found_by_counts() -> None:
    """Equal experts give equal partial schedules: 1,024 experts of two kinds are few of them."""
    n = 1024
    cached = np.arange(n) % 2 == 0
    layer = Layer(np.ones(n, np.int64), cached, np.full(n, 1.0), 0.5, 0.75)
    best = min(
        max(
            float(on_cpu + other),
            max(0.5 * (512 - on_cpu + moved), 0.75 * moved + 0.5 * (moved > 0)),
        )
        for on_cpu in range(513)
        for other in range(513)
        for moved in [512 - other]
    )
    assert schedule_layer(layer, "exact").makespan == best
    assert schedule_layer(layer, "hybrid").makespan == best


def test_exact_takes_twenty_experts_whose_sums_all_differ() -> None:
    """The hardest layers: nothing is moved, each expert costs the same on both devices."""
    rng = np.random.default_rng(3)
    weights = rng.integers(2**39, 2**40, 20).astype(float)
    layer = Layer(np.ones(20, np.int64), [True] * 20, weights, weights, 1.0)
    halves = [np.zeros(1), np.zeros(1)]
    for k, weight in enumerate(weights):
        halves[k % 2] = np.concatenate((halves[k % 2], halves[k % 2] + weight))
    # Meet in the middle: the sum of a subset that is nearest to the half from above.
    first, second = np.sort(halves[0]), np.sort(halves[1])
    need = np.searchsorted(second, weights.sum() / 2 - first, side="left")
    reach = need < len(second)
    want = (first[reach] + second[need[reach]]).min()
    assert schedule_layer(layer, "exact").makespan == want


def test_exact_says_when_a_layer_is_too_much_for_it() -> None:
    rng = np.random.default_rng(4)
    weights = rng.integers(2**49, 2**50, 60).astype(float)
    layer = Layer(np.ones(60, np.int64), [True] * 60, weights, weights, 1.0)
    with pytest.raises(ValueError, match=r"policy 'exact': got more than 2\^20 partial schedules"):
        schedule_layer(layer, "exact")
    half = weights.sum() / 2
    assert schedule_layer(layer, "hybrid").makespan <= 1.001 * half
