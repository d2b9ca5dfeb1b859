"""Which device computes each activated expert of a layer, and what crosses the bus for it.

Axes: n activated experts of one layer, q queued transfers. Every time is in one unit, the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone import _core

Policy = Literal[
    "fixed", "gpu_only", "cpu_only", "fiddler", "list", "event", "hybrid", "exact"
]  # fmt: skip
"""How the partition is chosen.

`fixed`: cached experts on the GPU, the others on the CPU. `gpu_only`: all on the GPU, moved on
demand. `cpu_only`. `fiddler`: of each expert the cheaper of CPU and transfer + GPU, as if it were
alone. `list`: one list, the GPU from its front and the CPU from its back, whichever would be done
first. `event`: the event simulation of HybriMoE. `hybrid`: the best of `list`, `event` and sorted
partitions, then dynamic programming of bounded width. `exact`: the optimum, at a cost that may
grow exponentially.
"""
POLICIES: tuple[Policy, ...] = get_args(Policy)
MAX_EXPERTS = 1024
MAX_TIME = 1e100
MAX_DISTANCE = 3

Floats = NDArray[np.float64]
Interval = tuple[str, float, float, str, str]
"""Resource, start, end, label, kind."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The experts that one layer activates, and what each would cost where.

    Axes: n activated experts.

    Args:
        loads: [n] int, tokens routed to each, 1 or more.
        ready: [n] when the GPU has the weights: 0 for cached, the arrival for those in flight,
            infinity where they would have to be moved. Or bool: cached.
        cpu: [n] time on the CPU, at its load.
        gpu: time on the GPU, [n] or one for all.
        transfer: time on the bus, [n] or one for all.
        cpu_first: on top for the first expert that the CPU computes.
        cpu_free, gpu_free: when the device is idle.
        pcie_free: when the bus is idle. It is never idle before the last arrival in flight.

    Raises:
        ValueError: lengths that disagree, more than 1024 experts, a load below 1, a time that is
            negative, NaN or above 1e100.
        TypeError: loads that are no integers, times that are no numbers.
    """

    loads: NDArray[np.int64]
    ready: Floats
    cpu: Floats
    gpu: Floats
    transfer: Floats
    cpu_first: float = 0.0
    cpu_free: float = 0.0
    gpu_free: float = 0.0
    pcie_free: float = 0.0

    def __init__(
        self,
        loads: ArrayLike,
        ready: ArrayLike,
        cpu: ArrayLike,
        gpu: ArrayLike,
        transfer: ArrayLike,
        *,
        cpu_first: float = 0.0,
        cpu_free: float = 0.0,
        gpu_free: float = 0.0,
        pcie_free: float = 0.0,
    ) -> None:
        whole = _loads(loads)
        count = len(whole)
        columns = {
            "loads": whole,
            "ready": _ready(ready, count),
            "cpu": _times("cpu", cpu, count),
            "gpu": _times("gpu", gpu, count, one_for_all=True),
            "transfer": _times("transfer", transfer, count, one_for_all=True),
        }
        starts = {
            "cpu_first": cpu_first,
            "cpu_free": cpu_free,
            "gpu_free": gpu_free,
            "pcie_free": pcie_free,
        }
        for name, column in columns.items():
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        for name, start in starts.items():
            object.__setattr__(self, name, _time(name, start))

    def __len__(self) -> int:
        return len(self.loads)

    @property
    def starts(self) -> tuple[float, float, float, float]:
        """cpu_first, cpu_free, gpu_free, pcie_free."""
        return self.cpu_first, self.cpu_free, self.gpu_free, self.pcie_free

    @property
    def columns(self) -> tuple[NDArray[np.int64], Floats, Floats, Floats, Floats]:
        """loads, ready, cpu, gpu, transfer."""
        return self.loads, self.ready, self.cpu, self.gpu, self.transfer


@dataclass(frozen=True, eq=False)
class Schedule:
    """What each device does when.

    Axes: n activated experts, as in the layer.
    """

    policy: Policy
    device: NDArray[np.uint8]
    """[n] 0 CPU, 1 GPU."""
    order: NDArray[np.int32]
    """[n] place in the queue of the device."""
    start: Floats
    """[n]"""
    end: Floats
    """[n]; `cpu_first` is within the first interval of the CPU."""
    transfer_start: Floats
    """[n] NaN where nothing is moved."""
    transfer_end: Floats
    """[n] NaN where nothing is moved."""
    cpu_end: float
    gpu_end: float
    pcie_end: float
    makespan: float
    """When the last expert is done; 0 where there is none."""

    def intervals(self, labels: Sequence[str] | None = None) -> list[Interval]:
        """All work as (resource, start, end, label, kind), by resource and then by time.

        Resources are "cpu", "gpu" and "pcie", kinds "compute" and "transfer".

        Args:
            labels: n names; None: "expert 0" and so on.

        Raises:
            ValueError: another number of labels.
        """
        count = len(self.device)
        names = [f"expert {i}" for i in range(count)] if labels is None else list(labels)
        if len(names) != count:
            raise ValueError(f"labels: got {len(names)}, expected {count}")
        found: list[Interval] = []
        for i, name in enumerate(names):
            resource = "gpu" if self.device[i] else "cpu"
            found.append((resource, float(self.start[i]), float(self.end[i]), name, "compute"))
            if not math.isnan(self.transfer_start[i]):
                span = float(self.transfer_start[i]), float(self.transfer_end[i])
                found.append(("pcie", *span, name, "transfer"))
        return sorted(found)


def schedule_layer(layer: Layer, policy: Policy = "hybrid") -> Schedule:
    """Chooses a device for each expert of a layer, so that the last one is done early.

    Every partition is laid out in the same order, the best for it: the GPU takes what it has, by
    arrival and then by load, and then what is moved, by Johnson's rule; the CPU takes the same list
    from its back. Policies differ in the partition. Equal arguments give equal schedules.

    Args:
        layer: loads and costs of n experts; none gives an empty schedule.
        policy: how the partition is chosen.

    Returns:
        A `Schedule`; its makespan is the last end.

    Raises:
        ValueError: an unknown policy; `exact` on a layer that would need more than 2^20 partial
            schedules at once.
        TypeError: `layer` is no Layer.

    Source: HybriMoE, arXiv 2504.05897, section 4 (`event`), and its repository (`list`); Johnson,
    "Optimal two- and three-stage production schedules", 1954. Oracle:
    `quernstone.moe.reference_schedule.schedule_layer`, and HiGHS.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer: got {type(layer).__name__}, expected a Layer")
    _check_policy(policy)
    device, order, start, end, sent, arrived, ends = _core.moe.schedule(
        *layer.columns, layer.starts, policy
    )
    return Schedule(policy, device, order, start, end, sent, arrived, *ends)


class Prefetch(NamedTuple):
    """A transfer that is worth its time on an idle bus."""

    layer: int
    """Index into the predicted layers."""
    expert: int
    """Index into the experts of that layer."""
    start: float
    """Within the budget, which begins at 0."""
    end: float
    drop: float
    """How much earlier the layer is done, where the prediction is right."""
    gain: float
    """`drop` times the probability."""


def prefetch(
    layers: Sequence[Layer],
    probabilities: Sequence[ArrayLike],
    budget: float,
    *,
    limit: int | None = None,
    policy: Policy = "hybrid",
) -> list[Prefetch]:
    """Chooses experts of the next layers to move while the bus is idle.

    Each choice has the greatest expected gain per time on the bus: the drop of its layer's makespan
    when it is cached beside those chosen before, times the probability that the layer will use it.
    The layers are scheduled anew for every candidate.

    Axes: n experts of each layer, which may differ.

    Args:
        layers: one to three, as their gates predict them; none is allowed. Only experts whose
            `ready` is infinite are candidates.
        probabilities: per layer [n] or one for all, from 0 to 1.
        budget: idle time of the bus. No transfer ends later.
        limit: most transfers, such as free slots of the cache. None: any number.
        policy: what the layers are scheduled by.

    Returns:
        The transfers in the order of choice, back to back from 0 on.

    Raises:
        ValueError: more than three layers, a probability outside 0 to 1, a bad budget or limit.
        TypeError: an element of `layers` that is no Layer.

    Source: HybriMoE, arXiv 2504.05897, impact-driven prefetching; the weight by probability is
    ours. Oracle: `quernstone.moe.reference_schedule.prefetch`.
    """
    if len(layers) > MAX_DISTANCE:
        raise ValueError(f"layers: got {len(layers)}, expected at most {MAX_DISTANCE}")
    if len(probabilities) != len(layers):
        raise ValueError(
            f"probabilities: got {len(probabilities)}, expected one for each of {len(layers)} "
            "layers"
        )
    most = sum(len(layer) for layer in layers if isinstance(layer, Layer))
    if limit is not None:
        if isinstance(limit, bool) or not hasattr(limit, "__index__"):
            raise TypeError(f"limit: got {type(limit).__name__} {limit!r}, expected int or None")
        if limit < 0:
            raise ValueError(f"limit: got {limit}, expected 0 or more")
        most = min(most, limit)
    _check_policy(policy)
    predicted = []
    for i, (layer, probability) in enumerate(zip(layers, probabilities, strict=True)):
        if not isinstance(layer, Layer):
            raise TypeError(f"layers[{i}]: got {type(layer).__name__}, expected a Layer")
        name = f"probabilities[{i}]"
        chance = _times(name, probability, len(layer), one_for_all=True, most=1.0)
        predicted.append((*layer.columns, layer.starts, chance))
    found = _core.moe.prefetch(predicted, _time("budget", budget), most, policy)
    return [Prefetch(*one) for one in found]


class Kept(NamedTuple):
    """What becomes of a queue of transfers."""

    keep: NDArray[np.bool_]
    """[q]"""
    arrival: Floats
    """[q] infinity where dropped."""
    pcie_free: float
    """When the bus has done what is kept."""


def cancel(
    transfer: ArrayLike,
    needed: ArrayLike,
    *,
    elapsed: float = 0.0,
    tiles: int = 1,
    now: float = 0.0,
) -> Kept:
    """Drops transfers that turned out to be needless, as far as they can still be stopped.

    What has not begun and is not needed is dropped. The first, once begun, is stopped at the end of
    its tile; with one tile it runs to its end, and then it is kept. What is kept and has not begun
    may be dropped too and left to the schedule of its layer, as not cached.

    Axes: q transfers in the order of the queue.

    Args:
        transfer: [q] time of each on the bus.
        needed: [q] bool: the layer really uses the expert, or a later layer may.
        elapsed: time that the first has been on the bus; 0: it has not begun.
        tiles: parts of a transfer, after each of which it can be stopped.
        now: the time.

    Returns:
        `Kept`; finite arrivals are what `Layer` calls `ready`.

    Raises:
        ValueError: lengths that disagree, times that are none, `elapsed` above the first transfer,
            `tiles` below 1.
        TypeError: `needed` that is not bool, `tiles` that is no int.

    Oracle: `quernstone.moe.reference_schedule.cancel`.
    """
    times = np.asarray(transfer)
    count = len(times) if times.ndim == 1 else 0
    times = _times("transfer", times, count)
    flags = np.ascontiguousarray(needed)
    if flags.size == 0:
        flags = flags.astype(np.bool_)
    if flags.dtype != np.bool_:
        raise TypeError(f"needed: got dtype {flags.dtype}, expected bool")
    _check_shape("needed", flags, count, one_for_all=False)
    if isinstance(tiles, bool) or not hasattr(tiles, "__index__"):
        raise TypeError(f"tiles: got {type(tiles).__name__} {tiles!r}, expected int")
    if not 1 <= tiles < 2**31:
        raise ValueError(f"tiles: got {tiles}, expected 1 or more and below 2^31")
    elapsed = _time("elapsed", elapsed)
    first = float(times[0]) if count else 0.0
    if elapsed > first:
        raise ValueError(f"elapsed: got {elapsed}, expected at most the first transfer, {first}")
    return Kept(*_core.moe.cancel(times, flags, elapsed, int(tiles), _time("now", now)))


def _check_policy(policy: object) -> None:
    if not isinstance(policy, str):
        raise TypeError(f"policy: got {type(policy).__name__} {policy!r}, expected str")
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")


def _loads(x: ArrayLike) -> NDArray[np.int64]:
    loads = np.asarray(x)
    if loads.ndim != 1:
        raise ValueError(f"loads.ndim: got {loads.ndim}, expected 1")
    if len(loads) > MAX_EXPERTS:
        raise ValueError(
            f"loads.shape[0] (experts): got {len(loads)}, expected at most {MAX_EXPERTS}"
        )
    if len(loads) and not np.issubdtype(loads.dtype, np.integer):
        raise TypeError(f"loads: got dtype {loads.dtype}, expected an integer one")
    for bad in np.flatnonzero((loads < 1) | (loads > np.iinfo(np.int64).max))[:1]:
        raise ValueError(f"loads[{bad}]: got {loads[bad]}, expected 1 or more and below 2^63")
    return np.array(loads, dtype=np.int64, order="C")


def _ready(x: ArrayLike, count: int) -> Floats:
    ready = np.asarray(x)
    if ready.dtype == np.bool_:
        ready = np.where(ready, 0.0, np.inf)
    return _times("ready", ready, count, infinite=True)


def _times(
    name: str,
    x: ArrayLike,
    count: int,
    *,
    one_for_all: bool = False,
    infinite: bool = False,
    most: float = MAX_TIME,
) -> Floats:
    given = np.asarray(x)
    _check_shape(name, given, count, one_for_all)
    if given.size and not (
        np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)
    ):
        raise TypeError(f"{name}: got dtype {given.dtype}, expected a real one")
    times = np.array(np.broadcast_to(given, count), dtype=np.float64, order="C")
    good = (times >= 0) & (times <= most)
    if infinite:
        good |= np.isposinf(times)
    for bad in np.flatnonzero(~good)[:1]:
        wanted = f"0 to {most:g}" + (", or infinity" if infinite else "")
        raise ValueError(f"{name}[{bad}]: got {times[bad]}, expected {wanted}")
    return times


def _check_shape(name: str, x: NDArray[Any], count: int, one_for_all: bool) -> None:
    if x.ndim == 0 and one_for_all:
        return
    if x.ndim != 1:
        raise ValueError(f"{name}.ndim: got {x.ndim}, expected {'0 or 1' if one_for_all else 1}")
    if len(x) != count:
        raise ValueError(f"{name}.shape[0]: got {len(x)}, expected {count}")


def _time(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float | np.floating | np.integer):
        raise TypeError(f"{name}: got {type(x).__name__} {x!r}, expected float")
    # Of a narrower type the limit would be infinity.
    time = float(x) if isinstance(x, np.floating) else x
    if not 0 <= time <= MAX_TIME:
        raise ValueError(f"{name}: got {x}, expected 0 to {MAX_TIME:g}")
    return float(time)
