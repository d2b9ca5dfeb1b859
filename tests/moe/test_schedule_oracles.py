"""Against the plain-Python twin, against enumeration, and against HiGHS."""

import numpy as np
import pytest

from quernstone.moe import Layer, schedule_layer
from quernstone.moe import reference_schedule as reference
from quernstone.moe.schedule import POLICIES, Policy

from .layers import HEURISTICS, random_layers
from .oracles import least_makespan

COLUMNS = ("order", "start", "end", "transfer_start", "transfer_end")
SCALARS = ("makespan", "cpu_end", "gpu_end", "pcie_end")


@pytest.mark.parametrize("policy", HEURISTICS)
def test_every_policy_is_its_plain_twin(policy: Policy) -> None:
    """Times are exact, so the twins agree to the bit."""
    layers = random_layers(250, seed=10, most=9)
    layers += random_layers(15, seed=11, least=18, most=24)
    for layer in layers:
        got, want = schedule_layer(layer, policy), reference.schedule_layer(layer, policy)
        assert got.makespan == want.makespan
        if policy != "hybrid":  # which may find another partition that is as good
            np.testing.assert_array_equal(got.device, want.device)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_partition_is_laid_out_as_by_the_twin(policy: Policy) -> None:
    for layer in random_layers(150, seed=12, most=10):
        got = schedule_layer(layer, policy)
        want = reference.lay_out(layer, (got.device == 1).tolist())
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        for name in SCALARS:
            assert getattr(got, name) == getattr(want, name)


def test_exact_is_the_best_of_all_partitions() -> None:
    for layer in random_layers(100, seed=13, most=8) + random_layers(3, seed=14, least=12, most=12):
        got = schedule_layer(layer, "exact").makespan
        assert got == reference.schedule_layer(layer, "exact").makespan


def test_exact_is_the_best_of_all_partitions_where_sums_are_rounded() -> None:
    rng = np.random.default_rng(15)
    for _ in range(60):
        n = int(rng.integers(1, 8))
        times = (rng.random(n) for _ in range(3))
        layer = Layer(np.ones(n, np.int64), rng.random(n) < 0.5, *times, cpu_first=rng.random())
        want = reference.schedule_layer(layer, "exact").makespan
        # A sum of n times is known to n u; partial schedules are cut at 1e-12.
        assert schedule_layer(layer, "exact").makespan == pytest.approx(want, rel=2e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_exact_is_what_highs_finds(n: int) -> None:
    """HiGHS chooses partition and every order; it is right to 1e-6 of a constraint's size."""
    for layer in random_layers(10, seed=20 + n, least=n, most=n):
        want = least_makespan(layer)
        assert schedule_layer(layer, "exact").makespan == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_the_relaxation_is_a_bound() -> None:
    """The bound of no partial schedule may be above what completing it takes."""
    for layer in random_layers(60, seed=30, least=2, most=6):
        best = reference.schedule_layer(layer, "exact").makespan
        costs = {i: float(layer.gpu[i]) for i in range(len(layer))}
        start = layer.cpu_free + layer.cpu_first
        bound = reference.relaxed(layer, start, layer.gpu_free, costs)
        ends = [
            max(s.cpu_end if 0 in s.device else start, s.gpu_end)
            for s in (
                reference.lay_out(layer, [bool(k >> i & 1) for i in range(len(layer))])
                for k in range(1 << len(layer))
            )
        ]
        assert bound <= min(ends) * (1 + 1e-12)
        assert best <= min(ends)


def test_no_label_is_missed_where_the_width_suffices() -> None:
    """Unlimited width and no incumbent: the twin's dynamic programming is enumeration."""
    for layer in random_layers(40, seed=31, least=1, most=7):
        found = reference.labels(layer, 1e9, width=10**6)
        assert found is not None
        best = min(
            reference.makespan(layer, found),
            reference.makespan(layer, [True] * len(layer)),
            reference.makespan(layer, [False] * len(layer)),
        )
        assert best == reference.schedule_layer(layer, "exact").makespan
