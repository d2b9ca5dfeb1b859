"""Random layers, and what holds for every schedule of one.

Times are multiples of 1/64, so that sums are exact in any order and equal means equal.
"""

import itertools
import math

import numpy as np

from quernstone.moe import Layer, Schedule
from quernstone.moe.schedule import POLICIES, Policy

HEURISTICS: tuple[Policy, ...] = tuple(p for p in POLICIES if p != "exact")
UNIT = 64


def random_layer(rng: np.random.Generator, n: int) -> Layer:
    """Costs of their own or one for all, some experts in flight, timelines that start late."""

    def times(most: int, size: int | None = None) -> np.ndarray:
        return rng.integers(0, most, size) / UNIT

    def start() -> float:
        return float(times(64)) if rng.random() < 0.3 else 0.0

    ready = np.where(rng.random(n) < rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.8, 0.1]), 0.0, np.inf)
    if rng.random() < 0.3:
        ready = np.where(rng.random(n) < 0.3, times(256, n), ready)
    transfer = times(128, n) if rng.random() < 0.5 else np.full(n, times(128))
    gpu = times(128, n) if rng.random() < 0.6 else np.full(n, times(128))
    return Layer(
        rng.integers(1, 6, n),
        ready,
        times(256, n),
        gpu,
        transfer,
        cpu_first=float(times(64)),
        cpu_free=start(),
        gpu_free=start(),
        pcie_free=start(),
    )


def random_layers(count: int, seed: int, least: int = 0, most: int = 8) -> list[Layer]:
    rng = np.random.default_rng(seed)
    return [random_layer(rng, int(rng.integers(least, most + 1))) for _ in range(count)]


def bus_free(layer: Layer) -> float:
    return max([layer.pcie_free, *(t for t in layer.ready.tolist() if math.isfinite(t))])


def assert_feasible(layer: Layer, schedule: Schedule) -> None:
    """Every expert once, nothing before its time, nothing twice at a time, and the ends told."""
    n = len(layer)
    assert set(schedule.device.tolist()) <= {0, 1}
    free = {"cpu": layer.cpu_free, "gpu": layer.gpu_free, "pcie": bus_free(layer)}
    found = schedule.intervals([str(i) for i in range(n)])
    computed = [int(label) for _, _, _, label, kind in found if kind == "compute"]
    assert sorted(computed) == list(range(n))
    moved = {int(label) for resource, _, _, label, _ in found if resource == "pcie"}
    on_gpu = {i for i in range(n) if schedule.device[i] == 1}
    assert moved == {i for i in on_gpu if math.isinf(layer.ready[i])}

    ends = dict(free)
    for resource in free:
        mine = sorted(interval[1:4] for interval in found if interval[0] == resource)
        for start, end, _ in mine:
            assert ends[resource] <= start <= end
            ends[resource] = end
        if resource == "pcie":
            continue
        # The queue is the order in time; work of no length may share its time with others.
        times = [(schedule.order[int(x)], start, end) for start, end, x in mine]
        times.sort()
        assert [order for order, _, _ in times] == list(range(len(mine)))
        assert all(a[2] <= b[1] for a, b in itertools.pairwise(times))
    for i in range(n):
        length = schedule.end[i] - schedule.start[i]
        if schedule.device[i] == 1:
            assert length == layer.gpu[i]
            arrival = layer.ready[i]
            if i in moved:
                sent = schedule.transfer_end[i] - schedule.transfer_start[i]
                assert sent == layer.transfer[i]
                arrival = schedule.transfer_end[i]
            assert schedule.start[i] >= arrival
        else:
            first = layer.cpu_first if schedule.order[i] == 0 else 0.0
            assert length == layer.cpu[i] + first
    told = schedule.cpu_end, schedule.gpu_end, schedule.pcie_end
    assert told == tuple(ends.values())
    assert schedule.makespan == max([0.0, *schedule.end.tolist()])
