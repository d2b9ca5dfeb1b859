"""A routing trace through a cache and the scheduler: how long its layers would take.

Axes: l layers, s steps, n activated experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quernstone.moe.cache.policies import Policy as CachePolicy
from quernstone.moe.cache.policies import check_policy
from quernstone.moe.cost import CostModel
from quernstone.moe.replay import hits
from quernstone.moe.schedule import POLICIES, Layer, Policy, schedule_layer
from quernstone.moe.stream import layer_stream
from quernstone.moe.trace import Trace
from quernstone.plan import Interval, Plan


@dataclass(frozen=True)
class Simulation:
    """What a trace would take; simulated, of the experts alone."""

    seconds: dict[Policy, float]
    """Of all steps and layers, by the schedule's policy."""
    hit_rate: float
    steps: int

    def speed_up(self, policy: Policy, over: Policy = "fixed") -> float:
        """Time under `over` by time under `policy`.

        Raises:
            ValueError: one of them was not simulated.
        """
        for name, value in (("policy", policy), ("over", over)):
            if value not in self.seconds:
                raise ValueError(
                    f"{name}: got {value!r}, expected one of {', '.join(self.seconds)}"
                )
        return self.seconds[over] / self.seconds[policy]


def simulate(
    trace: Trace,
    costs: CostModel,
    slots: int,
    *,
    cache: CachePolicy = "reuse",
    policies: Sequence[Policy] = ("fixed", "gpu_only", "cpu_only", "fiddler", "event", "hybrid"),
) -> Simulation:
    """Adds up the makespans of every layer of every step.

    An expert that hits in its layer's cache is on the GPU when the layer begins; one that misses
    is computed where the schedule says, and is in the cache afterwards: that it got there beside
    the schedule costs nothing here. Layers do not overlap, and attention takes no time.

    Args:
        trace: the routing of a model.
        costs: of an expert, usually of another model than the trace's: then the figures are of
            that model's experts with this one's routing.
        slots: of each layer's cache.
        cache: the policy of the caches.
        policies: of the schedules.

    Raises:
        ValueError: an unknown policy, a number of slots below 0, a cache that needs scores which
            the trace lacks.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"policies: got {policy!r}, expected some of {', '.join(POLICIES)}")
    resident = resident_experts(trace, cache, slots)
    seconds = dict.fromkeys(policies, 0.0)
    hit = requests = 0
    for layer in range(trace.layers):
        for step in range(trace.number_of_steps):
            _, loads, ready = active_experts(trace, resident[layer], layer, step)
            hit, requests = hit + int(ready.sum()), requests + len(ready)
            problem = costs.layer(loads, ready)
            for policy in policies:
                seconds[policy] += schedule_layer(problem, policy).makespan
    return Simulation(seconds, hit / requests, trace.number_of_steps)


def plan_step(
    trace: Trace,
    costs: CostModel,
    slots: int,
    step: int,
    *,
    cache: CachePolicy = "reuse",
    policy: Policy = "hybrid",
) -> Plan:
    """The layers of one step, one after the other, as a plan with a row for each resource.

    Args:
        step: of the trace.
        trace, costs, slots, cache, policy: as `simulate` takes them.
    """
    if not 0 <= step < trace.number_of_steps:
        raise ValueError(f"step: got {step}, expected 0 to {trace.number_of_steps - 1}")
    resident = resident_experts(trace, cache, slots)
    begin, intervals = 0.0, list[Interval]()
    for layer in range(trace.layers):
        keys, loads, ready = active_experts(trace, resident[layer], layer, step)
        found = schedule_layer(costs.layer(loads, ready), policy)
        labels = [f"{layer}.{key}" for key in keys]
        intervals += shifted(found.intervals(labels), begin)
        begin += found.makespan
    title = f"step {step}: {policy} schedule, {cache} cache of {slots} experts, simulated"
    return Plan(("gpu", "pcie", "cpu"), tuple(intervals), title=title)


def plan_layer(
    layer: Layer, policy: Policy = "hybrid", title: str = "", *, unit: str = "s"
) -> Plan:
    """The schedule of one layer as a plan; `unit` is that of the layer's times."""
    found = schedule_layer(layer, policy).intervals()
    return Plan(("gpu", "pcie", "cpu"), tuple(shifted(found, 0.0)), unit=unit, title=title)


def shifted(
    intervals: Sequence[tuple[str, float, float, str, str]], begin: float
) -> Iterator[Interval]:
    for resource, start, end, label, kind in intervals:
        yield Interval(resource, begin + start, begin + end, label, kind)


def resident_experts(trace: Trace, cache: CachePolicy, slots: int) -> list[list[dict[int, bool]]]:
    """[l][s]: of each expert that the step needs, in its order, whether it hits."""
    check_policy(cache)
    found = []
    for layer in range(trace.layers):
        stream = layer_stream(trace, layer)
        hit = hits(stream, cache, slots)
        starts = stream.offsets.tolist()
        found.append(
            [
                dict(zip(keys, hit[a : a + len(keys)].tolist(), strict=True))
                for a, keys in zip(starts, stream, strict=False)
            ]
        )
    return found


def active_experts(
    trace: Trace, resident: list[dict[int, bool]], layer: int, step: int
) -> tuple[list[int], NDArray[np.int64], NDArray[np.bool_]]:
    """Experts of a step in a layer, their loads, and whether they are cached."""
    first, last = np.searchsorted(trace.steps, [step, step + 1])
    counts = np.bincount(
        trace.ids[layer, first:last][trace.ids[layer, first:last] >= 0], minlength=trace.experts
    )
    keys = list(resident[step])
    return keys, counts[keys].astype(np.int64), np.array([resident[step][k] for k in keys])
