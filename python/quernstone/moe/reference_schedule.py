"""The scheduler in plain Python: every policy, the optimum by enumeration, prefetch, cancellation.

The optimum of `exact` takes 2^n steps. Everything else follows the definitions in
`csrc/moe/README.md`; nothing here is on a fast path.

Axes: n activated experts of one layer, q queued transfers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cmp_to_key
from typing import NamedTuple

import numpy as np

from quernstone.moe.schedule import Kept, Layer, Policy, Prefetch, Schedule

OnGpu = list[bool]
"""A partition: [n], by expert."""
WIDTH = 16
ROUNDING = 1e-12


def cached(layer: Layer, i: int) -> bool:
    """Whether the GPU has the weights, or will have them without a transfer of ours."""
    return math.isfinite(layer.ready[i])


def bus_free(layer: Layer) -> float:
    """When the bus is idle: not before what is in flight has arrived."""
    arrivals = [float(t) for t in layer.ready if math.isfinite(t)]
    return max([layer.pcie_free, *arrivals])


def queue(layer: Layer) -> list[int]:
    """The experts as the GPU takes them; the CPU takes them from the back."""
    here = [i for i in range(len(layer)) if cached(layer, i)]
    here.sort(key=lambda i: (max(layer.ready[i], layer.gpu_free), -layer.loads[i], i))
    return here + johnson(layer, [i for i in range(len(layer)) if not cached(layer, i)])


def johnson(layer: Layer, experts: list[int]) -> list[int]:
    """Johnson's rule for transfer, then computation; larger loads break ties."""

    def compare(i: int, j: int) -> int:
        # i first where min(transfer_i, gpu_j) < min(transfer_j, gpu_i), made transitive by groups.
        fast_i, fast_j = (bool(layer.transfer[k] < layer.gpu[k]) for k in (i, j))
        if fast_i != fast_j:
            return -1 if fast_i else 1
        keys = [
            (layer.transfer[k] if fast_i else -layer.gpu[k], -layer.loads[k], k) for k in (i, j)
        ]
        return -1 if keys[0] < keys[1] else 1

    return sorted(experts, key=cmp_to_key(compare))


def lay_out(layer: Layer, on_gpu: Sequence[bool], policy: Policy = "fixed") -> Schedule:
    """The best order for a partition, and when everything begins and ends."""
    n = len(layer)
    device = np.array(on_gpu, dtype=np.uint8).reshape(n)
    order = np.zeros(n, dtype=np.int32)
    start, end, sent, arrived = (np.full(n, np.nan) for _ in range(4))
    gpu, bus, cpu = layer.gpu_free, bus_free(layer), layer.cpu_free
    ends = [0.0]
    items = queue(layer)
    for place, i in enumerate(i for i in items if on_gpu[i]):
        arrival = layer.ready[i]
        if not cached(layer, i):
            sent[i] = bus
            bus = arrival = arrived[i] = bus + layer.transfer[i]
        order[i], start[i] = place, max(gpu, arrival)
        gpu = end[i] = start[i] + layer.gpu[i]
        ends.append(gpu)
    first = layer.cpu_first
    for place, i in enumerate(i for i in reversed(items) if not on_gpu[i]):
        order[i], start[i] = place, cpu
        cpu = end[i] = cpu + (first + layer.cpu[i])
        first = 0.0
        ends.append(cpu)
    totals = (float(x) for x in (cpu, gpu, bus, max(ends)))
    return Schedule(policy, device, order, start, end, sent, arrived, *totals)


def makespan(layer: Layer, on_gpu: Sequence[bool]) -> float:
    """When the last expert of a partition is done."""
    return lay_out(layer, on_gpu).makespan


def fixed(layer: Layer) -> OnGpu:
    """Cached experts on the GPU, the others on the CPU (kTransformers)."""
    return [cached(layer, i) for i in range(len(layer))]


def gpu_only(layer: Layer) -> OnGpu:
    """Everything on the GPU."""
    return [True] * len(layer)


def cpu_only(layer: Layer) -> OnGpu:
    """Everything on the CPU."""
    return [False] * len(layer)


def fiddler(layer: Layer) -> OnGpu:
    """Least sum of times, which is the cheaper device of each expert that is not cached."""
    return [
        cached(layer, i) or bool(layer.transfer[i] + layer.gpu[i] < layer.cpu[i])
        for i in range(len(layer))
    ]


def by_load(layer: Layer, experts: Sequence[int]) -> list[int]:
    """Largest load first, of equals the first one."""
    return sorted(experts, key=lambda i: (-layer.loads[i], i))


def one_list(layer: Layer) -> OnGpu:
    """Cached, then the others, each by load: the GPU from the front, the CPU from the back."""
    n = len(layer)
    items = by_load(layer, [i for i in range(n) if cached(layer, i)])
    items += by_load(layer, [i for i in range(n) if not cached(layer, i)])
    on_gpu = [False] * n
    gpu, bus, cpu, first = layer.gpu_free, bus_free(layer), layer.cpu_free, layer.cpu_first
    while items:
        head, tail = items[0], items[-1]
        bus_then = bus if cached(layer, head) else bus + layer.transfer[head]
        arrival = layer.ready[head] if cached(layer, head) else bus_then
        gpu_then = max(gpu, arrival) + layer.gpu[head]
        cpu_then = cpu + (first + layer.cpu[tail])
        if gpu_then <= cpu_then:
            on_gpu[items.pop(0)] = True
            gpu, bus = gpu_then, bus_then
        else:
            items.pop()
            cpu, first = cpu_then, 0.0
    return on_gpu


def event(layer: Layer) -> OnGpu:
    """The event simulation of HybriMoE: of the three next events the earliest happens.

    The GPU computes the largest expert that it has or, idle, the one that arrives first. The CPU
    computes the smallest one that is neither cached nor moved, and when there is none left the
    smallest of the GPU's. The bus moves the largest. Ties go to GPU, CPU, bus in turn.
    """
    n = len(layer)
    here = {i: float(layer.ready[i]) for i in range(n) if cached(layer, i)}
    there = by_load(layer, [i for i in range(n) if i not in here])
    on_gpu = [False] * n
    moved: list[int] = []
    gpu, bus, cpu, first = layer.gpu_free, bus_free(layer), layer.cpu_free, layer.cpu_first

    def largest_first(experts: Sequence[int]) -> list[int]:
        # An expert that arrived stands behind its equals.
        late = {i: 1 + moved.index(i) if i in moved else 0 for i in experts}
        return sorted(experts, key=lambda i: (-layer.loads[i], late[i], i))

    while here or there:
        waiting = largest_first(list(here))
        times = [math.inf] * 3
        if here:
            soonest = min(max(gpu, t) for t in here.values())
            pick = next(i for i in waiting if max(gpu, here[i]) == soonest)
            times[0] = soonest + layer.gpu[pick]
        worker = there[-1] if there else waiting[-1]
        times[1] = cpu + (first + layer.cpu[worker])
        if there:
            times[2] = bus + layer.transfer[there[0]]
        happens = times.index(min(times))
        if happens == 0:
            on_gpu[pick] = True
            del here[pick]
            gpu = times[0]
        elif happens == 1:
            cpu, first = times[1], 0.0
            if there:
                there.pop()
            else:
                del here[worker]
        else:
            bus = times[2]
            moved.append(there[0])
            here[there.pop(0)] = bus
    return on_gpu


def cheapest_on_cpu(layer: Layer) -> OnGpu:
    """The best of the partitions whose CPU side is the cheapest a cached and b other experts."""
    items = queue(layer)
    place = {i: items.index(i) for i in items}
    cheap = sorted(items, key=lambda i: (layer.cpu[i], -place[i]))
    kinds = [[i for i in cheap if cached(layer, i) == kind] for kind in (True, False)]
    best: tuple[float, OnGpu] = math.inf, []
    for b in reversed(range(len(kinds[1]) + 1)):
        for a in range(len(kinds[0]) + 1):
            on_cpu = {*kinds[0][:a], *kinds[1][:b]}
            trial = [i not in on_cpu for i in range(len(layer))]
            best = min(best, (makespan(layer, trial), trial), key=lambda pair: pair[0])
    return best[1]


def uniform(layer: Layer) -> bool:
    """Whether GPU and bus cannot tell the experts of a kind apart, so that the above is optimal."""
    here = [i for i in range(len(layer)) if cached(layer, i)]
    there = [i for i in range(len(layer)) if not cached(layer, i)]
    same = {(layer.gpu[i], max(layer.ready[i], layer.gpu_free)) for i in here}
    moved = {(layer.gpu[i], layer.transfer[i]) for i in there}
    return len(same) <= 1 and len(moved) <= 1


class Label(NamedTuple):
    """A partition of the front of the queue."""

    bus: float
    gpu: float
    cpu: float
    bound: float
    gpu_side: tuple[int, ...]


def relaxed(layer: Layer, cpu: float, other: float, cost: dict[int, float]) -> float:
    """Least time for open experts when another machine may take the last one in part.

    Args:
        cpu, other: when the machines are idle.
        cost: the open experts and their time on the other machine.
    """

    def dearness(i: int) -> float:
        return layer.cpu[i] / cost[i] if cost[i] > 0 else math.inf

    order = sorted(cost, key=lambda i: -dearness(i))
    less, more = (list(itertools.accumulate(x, initial=0.0)) for x in (
        [float(layer.cpu[i]) for i in order], [cost[i] for i in order],
    ))  # fmt: skip
    cpu += less[-1]
    for k, i in enumerate(order):
        if other + more[k + 1] >= cpu - less[k + 1]:
            cpu, other = cpu - less[k], other + more[k]
            both = float(layer.cpu[i]) + cost[i]
            if cpu <= other or both == 0:
                return max(cpu, other)
            return cpu - (cpu - other) * (float(layer.cpu[i]) / both)
    return max(cpu - less[-1], other + more[-1])


def labels(layer: Layer, best: float, width: int = WIDTH) -> OnGpu | None:
    """A partition that is done before `best`, by dynamic programming along the queue, or None.

    Each expert goes to either device. Dropped is what cannot be done before `best`, what another
    label is not behind of anywhere, and all but the `width` labels of the least bound.
    """
    items = queue(layer)
    enough = best * (1 - ROUNDING)
    now = [Label(bus_free(layer), layer.gpu_free, layer.cpu_free + layer.cpu_first, 0.0, ())]
    for place, i in enumerate(items):
        rest = items[place + 1 :]
        on_gpu = {j: float(layer.gpu[j]) for j in rest}
        on_bus = {j: float(layer.transfer[j]) for j in rest if not cached(layer, j)}

        def bounded(
            label: Label, on_gpu: dict[int, float] = on_gpu, on_bus: dict[int, float] = on_bus
        ) -> Label:
            least = relaxed(layer, label.cpu, label.gpu, on_gpu)
            return label._replace(bound=max(least, relaxed(layer, label.cpu, label.bus, on_bus)))

        trials = [x._replace(cpu=x.cpu + float(layer.cpu[i])) for x in now]
        for x in now:
            bus = x.bus if cached(layer, i) else x.bus + float(layer.transfer[i])
            arrival = float(layer.ready[i]) if cached(layer, i) else bus
            gpu = max(x.gpu, arrival) + float(layer.gpu[i])
            trials.append(Label(bus, gpu, x.cpu, 0.0, (*x.gpu_side, i)))
        trials = sorted((x for x in map(bounded, trials) if x.bound < enough), key=lambda x: x[:3])
        now = []
        for x in trials:
            if not any(y.gpu <= x.gpu and y.cpu <= x.cpu for y in now):
                now.append(x)
        if len(now) > width:
            kept = sorted(range(len(now)), key=lambda k: (now[k].bound, k))[:width]
            now = [now[k] for k in sorted(kept)]
    if not now:
        return None
    found = min(now, key=lambda x: max(x.cpu, x.gpu))
    return [i in found.gpu_side for i in range(len(layer))]


def hybrid(layer: Layer) -> OnGpu:
    """The best of sorted partitions, list and event; then labels of bounded width."""
    starts = [cheapest_on_cpu(layer), one_list(layer), event(layer)]
    best = min(starts, key=lambda on_gpu: makespan(layer, on_gpu))
    if uniform(layer):
        return best
    better = labels(layer, makespan(layer, best))
    if better is not None and makespan(layer, better) < makespan(layer, best):
        return better
    return best


def exact(layer: Layer) -> OnGpu:
    """The best of all 2^n partitions."""
    trials = (list(trial) for trial in itertools.product((False, True), repeat=len(layer)))
    return min(trials, key=lambda on_gpu: makespan(layer, on_gpu))


CHOICES: dict[Policy, Callable[[Layer], OnGpu]] = {
    "fixed": fixed,
    "gpu_only": gpu_only,
    "cpu_only": cpu_only,
    "fiddler": fiddler,
    "list": one_list,
    "event": event,
    "hybrid": hybrid,
    "exact": exact,
}


def schedule_layer(layer: Layer, policy: Policy = "hybrid") -> Schedule:
    """`quernstone.moe.schedule_layer`."""
    return lay_out(layer, CHOICES[policy](layer), policy)


def with_cached(layer: Layer, experts: Sequence[int]) -> Layer:
    """The layer with some more experts in the cache."""
    ready = layer.ready.copy()
    ready[list(experts)] = 0.0
    first, cpu, gpu, pcie = layer.starts
    loads, _, *costs = layer.columns
    return Layer(
        loads, ready, *costs, cpu_first=first, cpu_free=cpu, gpu_free=gpu, pcie_free=pcie
    )  # fmt: skip


def prefetch(
    layers: Sequence[Layer],
    probabilities: Sequence[Sequence[float]],
    budget: float,
    *,
    limit: int | None = None,
    policy: Policy = "hybrid",
) -> list[Prefetch]:
    """`quernstone.moe.prefetch`."""
    chosen: list[Prefetch] = []
    bus = 0.0
    while limit is None or len(chosen) < limit:
        best, best_time = Prefetch(0, 0, 0.0, 0.0, 0.0, 0.0), 1.0
        for k, layer in enumerate(layers):
            had = [x.expert for x in chosen if x.layer == k]
            now = schedule_layer(with_cached(layer, had), policy).makespan
            for i in range(len(layer)):
                time = float(layer.transfer[i])
                if cached(layer, i) or i in had or bus + time > budget:
                    continue
                then = schedule_layer(with_cached(layer, [*had, i]), policy).makespan
                drop = now - then if now - then > ROUNDING * now else 0.0
                gain = drop * float(probabilities[k][i])
                if gain * best_time > best.gain * time:
                    best, best_time = Prefetch(k, i, bus, bus + time, drop, gain), time
        if best.gain <= 0:
            break
        chosen.append(best)
        bus = best.end
    return chosen


def cancel(
    transfer: Sequence[float],
    needed: Sequence[bool],
    *,
    elapsed: float = 0.0,
    tiles: int = 1,
    now: float = 0.0,
) -> Kept:
    """`quernstone.moe.cancel`, tile by tile."""
    keep, arrival, bus = [], [], now
    for place, (time, wanted) in enumerate(zip(transfer, needed, strict=True)):
        begun = elapsed if place == 0 else 0.0
        boundaries = [min(time, (k + 1) * (time / tiles)) for k in range(tiles - 1)] + [time]
        if wanted:
            stop = time
        elif begun > 0:
            stop = next(boundary for boundary in boundaries if boundary >= begun)
        else:
            stop = 0.0
        bus += stop - begun
        kept = wanted or (begun > 0 and stop == time)
        keep.append(kept)
        arrival.append(bus if kept else math.inf)
    return Kept(np.array(keep, dtype=np.bool_), np.array(arrival, dtype=np.float64), bus)
