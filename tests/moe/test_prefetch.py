"""Prefetches are worth their time, fit their budget, and are dropped when nobody needs them."""

import math

import numpy as np
import pytest

from quernstone.moe import Layer, Prefetch, cancel, prefetch, schedule_layer
from quernstone.moe import reference_schedule as reference
from quernstone.moe.schedule import Policy

from .layers import random_layers


def decoded(cached: list[bool], **changes: float) -> Layer:
    """One token: CPU 1, GPU 0.5, transfer 2 for each expert."""
    n = len(cached)
    return Layer([1] * n, cached, [1.0] * n, 0.5, 2.0, **changes)


def after(layers: list[Layer], found: list[Prefetch], policy: Policy) -> list[float]:
    """Makespans of the layers with what was prefetched in the cache."""
    ends = []
    for k, layer in enumerate(layers):
        had = [x.expert for x in found if x.layer == k]
        ends.append(schedule_layer(reference.with_cached(layer, had), policy).makespan)
    return ends


def scenes(count: int, seed: int) -> list[tuple[list[Layer], list[np.ndarray], float]]:
    """One to three layers, chances that fall with distance, and some idle time."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        layers = random_layers(int(rng.integers(1, 4)), int(rng.integers(2**31)), most=6)
        # Multiples of 1/16: with times of 1/64 every expected gain is exact.
        chances = [rng.integers(0, 17, len(x)) / 16 for x in layers]
        scenes.append((layers, chances, float(rng.integers(0, 400)) / 64))
    return scenes


@pytest.mark.parametrize("policy", ["event", "hybrid"])
def test_the_transfers_and_gains_are_those_of_the_twin(policy: Policy) -> None:
    for layers, chances, budget in scenes(30, seed=0):
        want = reference.prefetch(layers, chances, budget, policy=policy)
        assert prefetch(layers, chances, budget, policy=policy) == want


@pytest.mark.parametrize("policy", ["fixed", "fiddler", "list", "event", "hybrid", "exact"])
def test_right_predictions_never_make_a_layer_later_and_gains_are_what_is_saved(
    policy: Policy,
) -> None:
    some = 0
    for layers, chances, budget in scenes(80, seed=1):
        found = prefetch(layers, chances, budget, policy=policy)
        off = after(layers, [], policy)
        ends = after(layers, found, policy)
        assert all(end <= was for end, was in zip(ends, off, strict=True))
        saved = sum(off) - sum(ends)
        assert sum(x.drop for x in found) == pytest.approx(saved, abs=1e-9)
        for k in range(len(found)):
            before = after(layers, found[:k], policy)
            then = after(layers, found[: k + 1], policy)
            assert found[k].drop == sum(before) - sum(then) > 0
            assert found[k].gain == found[k].drop * chances[found[k].layer][found[k].expert]
        some += len(found) > 0
    assert some >= 15  # fiddler moves on demand what is worth it, which leaves it the least to gain


def test_a_chain_of_layers_is_never_slower_with_prefetch_when_predictions_are_right() -> None:
    """Each layer's idle bus serves the next ones; the layer itself is not touched."""
    gained = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        chain = []
        for _ in range(6):
            n = int(rng.integers(2, 9))
            times = (rng.integers(1, 128, n) / 64 for _ in range(2))
            chain.append(
                Layer(rng.integers(1, 6, n), rng.random(n) < 0.4, *times, 1.5, cpu_first=0.25)
            )
        off = sum(schedule_layer(layer).makespan for layer in chain)
        on = 0.0
        for k in range(len(chain)):
            schedule = schedule_layer(chain[k])
            idle = schedule.makespan - schedule.pcie_end
            on += schedule.makespan
            ahead = chain[k + 1 : k + 4]
            for x in prefetch(ahead, [0.9, 0.7, 0.5][: len(ahead)], max(0.0, idle)):
                assert schedule.pcie_end + x.end <= schedule.makespan + 1e-12
                chain[k + 1 + x.layer] = reference.with_cached(chain[k + 1 + x.layer], [x.expert])
        assert on <= off * (1 + 1e-12)
        gained += on < 0.98 * off
    assert gained > 20


def test_the_budget_and_the_limit_are_never_exceeded() -> None:
    for layers, chances, budget in scenes(100, seed=2):
        free = prefetch(layers, chances, budget)
        bus = 0.0
        for x in free:
            assert x.start == bus
            bus = x.end
            assert x.end - x.start == layers[x.layer].transfer[x.expert]
            assert math.isinf(layers[x.layer].ready[x.expert])
        assert bus <= budget
        assert len({(x.layer, x.expert) for x in free}) == len(free)
        for limit in range(len(free) + 2):
            assert prefetch(layers, chances, budget, limit=limit) == free[:limit]


def test_a_transfer_that_just_fits_is_taken_and_one_that_does_not_is_left() -> None:
    layer = decoded([False, False, False])
    assert len(prefetch([layer], [1.0], 2.0)) == 1
    assert prefetch([layer], [1.0], math.nextafter(2.0, 0.0)) == []
    assert prefetch([layer], [1.0], 0.0) == []


def test_a_cheaper_transfer_still_fits_when_the_best_does_not() -> None:
    # Both are moved: done at 4. With 0 cached at 1, with 1 cached at 3.25, with both at 0.5.
    layer = Layer([1, 1], [False, False], [9.0, 9.0], 0.25, [3.0, 0.75])
    assert [x.expert for x in prefetch([layer], [[1.0, 0.5]], 10.0)] == [0, 1]
    assert [x.expert for x in prefetch([layer], [[1.0, 0.5]], 1.0)] == [1]


def test_a_sure_small_gain_goes_before_an_unlikely_large_one() -> None:
    one = Layer([1], [False], [1.0], 0.25, 2.0)
    two = Layer([1], [False], [4.0], 0.25, 2.0)
    first = prefetch([one, two], [1.0, 0.125], 4.0)
    # 0.75 against 2.0 x 0.125: moving it on demand takes 2.25.
    assert [x.layer for x in first] == [0, 1]
    assert [x.drop for x in first] == [0.75, 2.0]
    assert [x.gain for x in first] == [0.75, 0.25]
    assert [x.layer for x in prefetch([one, two], [0.25, 1.0], 4.0)] == [1, 0]


def test_gain_per_time_decides() -> None:
    quick = Layer([1], [False], [2.0], 1.0, 1.5)
    slow = Layer([1], [False], [4.0], 1.0, 8.0)
    assert [x.layer for x in prefetch([slow, quick], [1.0, 1.0], 8.0)] == [1]
    assert [x.layer for x in prefetch([slow, quick], [1.0, 1.0], 9.5)] == [1, 0]


def test_what_no_layer_will_use_or_gain_from_is_not_moved() -> None:
    layer = decoded([False, False, False])
    assert prefetch([layer], [0.0], 100.0) == []
    assert prefetch([], [], 100.0) == []
    assert prefetch([Layer([], [], [], [], [])], [[]], 100.0) == []
    assert prefetch([decoded([True, True])], [1.0], 100.0) == []
    # The CPU is done before the GPU, whatever is cached.
    busy = Layer([1, 1], [True, False], [9.0, 0.5], 5.0, 1.0)
    assert prefetch([busy], [1.0], 100.0) == []


def test_what_is_in_flight_is_no_candidate() -> None:
    layer = Layer([1, 1], [0.5, math.inf], [4.0, 4.0], 0.5, 1.0)
    assert {x.expert for x in prefetch([layer], [1.0], 100.0)} <= {1}


def test_a_transfer_without_time_goes_first() -> None:
    layer = Layer([1, 1], [False, False], [4.0, 4.0], [0.5, 0.5], [1.0, 0.0], pcie_free=8.0)
    assert [x.expert for x in prefetch([layer], [1.0], 0.0)] == [1]


def test_a_queue_is_cut_to_what_is_needed() -> None:
    kept = cancel([2.0, 1.0, 1.0, 4.0], [True, False, True, False], elapsed=0.5, now=10.0)
    assert kept.keep.tolist() == [True, False, True, False]
    assert kept.arrival.tolist() == [11.5, math.inf, 12.5, math.inf]
    assert kept.pcie_free == 12.5


@pytest.mark.parametrize(
    ("elapsed", "tiles", "keep", "free"),
    [
        (0.0, 1, False, 0.0),  # not begun
        (0.5, 1, True, 1.5),  # cannot be stopped, so it arrives
        (0.5, 4, False, 0.0),  # at the end of a tile
        (0.75, 4, False, 0.25),
        (1.75, 4, True, 0.25),  # in the last tile
        (2.0, 4, True, 0.0),
        (2.0, 1, True, 0.0),
    ],
)
def test_a_needless_transfer_stops_at_the_end_of_its_tile(
    elapsed: float, tiles: int, keep: bool, free: float
) -> None:
    kept = cancel([2.0, 1.0], [False, False], elapsed=elapsed, tiles=tiles)
    assert kept.keep.tolist() == [keep, False]
    assert kept.arrival[0] == (free if keep else math.inf)
    assert kept.pcie_free == free


@pytest.mark.parametrize("transfer", [1.0, 0.1, 5e-324])
def test_a_transfer_in_its_last_tile_arrives_whatever_the_tiles(transfer: float) -> None:
    """49 times a 49th is less than 1."""
    for tiles in range(1, 300):
        kept = cancel([transfer], [False], elapsed=transfer * (1 - 0.1 / tiles), tiles=tiles)
        assert kept.keep.tolist() == [True], tiles


def test_a_needed_transfer_runs_to_its_end_whatever_its_tiles() -> None:
    kept = cancel([2.0], [True], elapsed=0.5, tiles=4, now=1.0)
    assert (kept.arrival[0], kept.pcie_free) == (2.5, 2.5)


def test_an_empty_queue_leaves_the_bus_idle() -> None:
    kept = cancel([], [], now=3.0)
    assert len(kept.keep) == len(kept.arrival) == 0
    assert kept.pcie_free == 3.0


def test_cancellations_are_those_of_the_twin() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        q = int(rng.integers(0, 6))
        tiles = int(rng.choice([1, 2, 4, 8]))
        transfer = rng.integers(0, 64, q) / 8
        needed = rng.random(q) < 0.5
        elapsed = float(rng.integers(0, 9)) / 8 * float(transfer[0]) if q else 0.0
        options = {"elapsed": elapsed, "tiles": tiles, "now": float(rng.integers(0, 9))}
        got = cancel(transfer, needed, **options)
        want = reference.cancel(transfer.tolist(), needed.tolist(), **options)
        np.testing.assert_array_equal(got.keep, want.keep)
        np.testing.assert_array_equal(got.arrival, want.arrival)
        assert got.pcie_free == want.pcie_free


def test_what_is_kept_can_be_scheduled_as_in_flight() -> None:
    kept = cancel([2.0, 2.0], [True, False], elapsed=1.0)
    layer = Layer(
        [1, 1], kept.arrival, [9.0, 9.0], 0.5, 2.0, pcie_free=kept.pcie_free
    )  # fmt: skip
    schedule = schedule_layer(layer, "gpu_only")
    assert schedule.start.tolist() == [1.0, 3.0]
    assert schedule.transfer_start[1] == 1.0
