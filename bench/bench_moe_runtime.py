"""The runtime of experts: plans against what came of them, on an emulated device; its own cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from quernstone import _core
from quernstone.bench.cases import runtime as cases
from quernstone.bench.harness import Measure, Named, WrongResult, rows
from quernstone.bench.rows import RivalResult, Spread, upper_bound
from quernstone.moe import EmulatedDevice, Experts, ExpertsShape, HybridMoE, Runtime
from quernstone.moe.recording import Recording
from quernstone.moe.schedule import Policy
from quernstone.plan import Plan

MACHINES = ("a6000-xeon10", "rtx4090", "h100")
PHASES = ("decode", "prefill")
ROUNDS = 3
MICRO = 1e6


@dataclass(frozen=True)
class EmulatedCase:
    kind: str
    phase: str
    machine: str
    quick: bool = False
    threads: int = 2

    @property
    def id(self) -> str:
        return f"moe.runtime.{self.kind}.{self.phase}.{self.machine}"


def _cases(kind: str) -> list[EmulatedCase]:
    return [
        EmulatedCase(kind, phase, machine, quick=machine == "a6000-xeon10")
        for phase in PHASES
        for machine in MACHINES
    ]


def emulated(machine: str) -> EmulatedDevice:
    return EmulatedDevice(cases.costs_of(machine), most_tokens=64)


def open_runtime(device: EmulatedDevice, policy: Policy = "hybrid", prefetch: int = 0) -> Runtime:
    of = cases.recorded()
    runtime = Runtime(of.experts, device, policy=policy, slots=cases.slots(), prefetch=prefetch)
    for name, weight in of.routers.items():
        runtime.set_router(name, weight)
    return runtime


def play(runtime: Runtime, phase: str) -> Recording:
    """The steps of a phase from the simulation's state of the caches; their bits are checked."""
    steps = cases.steps_of(phase)
    with runtime.recording() as recording:
        outputs = [cases.run_step(runtime, step) for step in steps]
    wrong = cases.errors(steps, outputs)
    if wrong:
        raise WrongResult(f"{phase}: {wrong} numbers differ from those of the CPU alone")
    return recording


def constants(device: EmulatedDevice, machine: str) -> list[str]:
    costs = cases.costs_of(machine)
    return [
        f"times of {machine} x{device.factor:g}: ms of one token, CPU "
        f"{1e3 * costs.cpu_seconds([1])[0]:.3g} + {1e3 * costs.cpu_first:.2g} for the first, GPU "
        f"{1e3 * costs.gpu([1])[0]:.2g}, transfer {1e3 * costs.transfer:.2g}, by published and "
        "assumed figures",
        f"costs of {cases.COSTS_OF}'s experts, int4; tokens, routing and experts of "
        f"{cases.MODEL}; {cases.SHARE:.0%} of the experts on the device",
    ]


def charts(planned: Plan, real: Plan) -> str:
    until = max(planned.makespan, real.makespan)
    kinds = ("compute", "transfer")
    return "".join(plan.svg(until=until, kinds=kinds) for plan in (planned, real))


@rows(*_cases("makespan"))
def bench_makespan(case: EmulatedCase, measure: Measure) -> None:
    """How far a layer's time is from what its schedule said."""
    device = emulated(case.machine)
    found: list[Recording] = []

    def compute() -> Spread:
        with open_runtime(device) as runtime:
            play(runtime, case.phase)  # caches and pages of the machine are warm
            found.extend(play(runtime, case.phase) for _ in range(ROUNDS))
            late = device.late
        layers = [step for recording in found for step in recording.steps]
        measure.row.notes.append(
            f"{len(layers)} layers; {late} times an emulated device was late; sum of all "
            f"{100 * (sum(x.took for x in layers) / sum(x.predicted for x in layers) - 1):+.1f} %"
        )
        return Spread.of([abs(x.took / x.predicted - 1) for x in layers]).scaled(100)

    measure.value(
        what=f"{case.phase} on {case.machine}, emulated: time of a layer against its plan",
        unit="%",
        kind="emulated",
        compute=compute,
        notes=["median of the layers' relative differences"],
    )
    measure.row.notes += constants(device, case.machine)
    if case.machine == MACHINES[0]:
        one = step_of(found[-1])
        measure.panel(
            f"Planned and recorded: {case.phase}",
            f"<div>{charts(one.predicted(), one.plan())}</div>",
            f"One step of {len(one.steps)} layers, from time-stamps of the workers; emulated.",
        )


def step_of(recording: Recording) -> Recording:
    """The first step of a recording by itself."""
    layers = cases.recorded().trace.layers
    one = Recording(recording.device, recording.layers)
    one.steps = recording.steps[:layers]
    end = one.steps[-1].begun + one.steps[-1].took
    one.real = [x for x in recording.real if one.steps[0].begun <= x[1] and x[2] <= end]
    one.planned = [x for x in recording.planned if x[1] < end]
    return one


@rows(*_cases("speedup"))
def bench_speed_up(case: EmulatedCase, measure: Measure) -> None:
    """Of ours over a fixed mapping, both executed; caches as the simulation has them."""
    costs = cases.costs_of(case.machine)
    device = emulated(case.machine)
    want = cases.simulated(costs, "fixed", case.phase) / cases.simulated(
        costs, "hybrid", case.phase
    )

    def seconds(policy: Policy) -> float:
        with open_runtime(device, policy) as runtime:
            cases.run_step(runtime, cases.steps_of(case.phase)[0])  # the machine is warm then
            recording = play(runtime, case.phase)
        return sum(step.took for step in recording.steps)

    def compute() -> Spread:
        return Spread.of([seconds("fixed") / seconds("hybrid") for _ in range(ROUNDS)])

    measure.value(
        what=f"{case.phase} on {case.machine}, emulated: time of the fixed mapping over ours",
        unit="x",
        kind="emulated",
        compute=compute,
        rivals={"simulated": want},
        smaller_is_better=False,
    )
    measure.row.notes += constants(device, case.machine)


@dataclass(frozen=True)
class PrefetchCase:
    machine: str
    quick: bool = False
    threads: int = 2

    @property
    def id(self) -> str:
        return f"moe.runtime.prefetch.{self.machine}"


@rows(*(PrefetchCase(machine, quick=machine == MACHINES[0]) for machine in MACHINES))
def bench_prefetch(case: PrefetchCase, measure: Measure) -> None:
    """Decoding with experts of the next three layers fetched ahead, over without, step by step."""
    devices = [emulated(case.machine) for _ in range(2)]
    steps = range(cases.WARM + cases.DECODED)

    def seconds(device: EmulatedDevice, prefetch: int) -> list[float]:
        with open_runtime(device, prefetch=prefetch) as runtime:
            times = []
            for step in steps:
                begin = time.perf_counter()
                cases.run_step(runtime, step, placed=False)
                times.append(time.perf_counter() - begin)
        return times[4:]  # the caches begin with experts of no merit

    def compute() -> float:
        devices[1].factor = devices[0].factor
        ratios: list[float] = []
        for turn in range(2):
            order = ((devices[0], 0), (devices[1], 3))[:: 1 if turn % 2 == 0 else -1]
            found = {prefetch: seconds(device, prefetch) for device, prefetch in order}
            ratios += [on / off for on, off in zip(found[3], found[0], strict=True)]
        measure.row.notes.append(
            f"median {1 / statistics.median(ratios):.3f}; ours is its lower 95 % bound over "
            f"{len(ratios)} paired steps"
        )
        return 1.0 / upper_bound(ratios)

    measure.value(
        what=f"decode on {case.machine}, emulated: time without prefetching over with",
        unit="x",
        kind="emulated",
        compute=compute,
        smaller_is_better=False,
    )
    measure.row.notes += constants(devices[0], case.machine)


OVERHEAD_ROUNDS, OVERHEAD_CALLS = 41, 200


def small_experts() -> tuple[Experts, tuple[torch.Tensor, ...]]:
    """Experts that take a few microseconds, and a call for one token."""
    generator = torch.Generator().manual_seed(0)
    count, hidden, wide, top_k = 16, 64, 64, 2
    experts = Experts.pack(
        torch.randn(count, 2 * wide, hidden, generator=generator) / 8,
        torch.randn(count, hidden, wide, generator=generator) / 8,
    )
    x = torch.randn(1, hidden, generator=generator)
    scores = torch.randn(1, count, generator=generator).softmax(-1)
    weights, ids = scores.topk(top_k)
    return experts, (x, ids, weights, scores)


def per_call(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def core_alone(experts: Experts, call: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """The experts as the core computes them, with nothing left to convert."""
    arrays = [tensor.numpy() for tensor in call[:3]]
    out = np.empty_like(arrays[0])
    layout = experts.shape.layout()

    def run() -> None:
        _core.moe.experts_forward(layout, experts.data, *arrays, "int8", out)

    return run


@rows(Named("moe.runtime.overhead.cpu", quick=True))
def bench_overhead(case: Named, measure: Measure) -> None:
    experts, call = small_experts()
    module, core = HybridMoE(experts), core_alone(experts, call)

    def compute() -> Spread:
        found = []
        for _ in range(OVERHEAD_ROUNDS):
            alone = per_call(core, OVERHEAD_CALLS)
            found.append(per_call(lambda: module(*call), OVERHEAD_CALLS) - alone)
        return Spread.of(found).scaled(MICRO)

    measure.value(
        what="a layer of HybridMoE on the CPU, beyond its experts",
        unit="us",
        compute=compute,
        notes=["beyond a call of the core with numpy arrays, which itself is not free"],
    )


@rows(Named("moe.runtime.overhead.device", quick=True))
def bench_overhead_of_device(case: Named, measure: Measure) -> None:
    """A step whose workers do real work and wait for nothing, against the same experts in turn."""
    experts, call = small_experts()
    core = core_alone(experts, call)
    shape = ExpertsShape(64, 2048, 1408)
    costs = replace(EmulatedDevice("a6000-xeon10").costs(shape), cpu_first=0.0)
    device = EmulatedDevice(costs, factor=1e-4)
    trips: list[float] = []
    at_once: list[float] = []

    def compute() -> Spread:
        found = []
        with Runtime(
            {"layer": experts}, device, slots=16, policy="gpu_only", cache="lru"
        ) as runtime:
            module = runtime.layer("layer")
            for _ in range(OVERHEAD_ROUNDS):
                alone, steps = [], []
                for _ in range(20):
                    for run, times in ((core, alone), (lambda: module(*call), steps)):
                        time.sleep(0.001)  # the workers park, and caches cool for both
                        times.append(per_call(run, 1))
                found.append(statistics.median(steps) - statistics.median(alone))
                alone_again = per_call(core, OVERHEAD_CALLS)
                at_once.append(per_call(lambda: module(*call), OVERHEAD_CALLS) - alone_again)
                trips.append(statistics.median(_core.moe.seconds_of_round_trips(20)))
        return Spread.of(found).scaled(MICRO)

    measure.value(
        what="a layer with all its experts on a device's worker, beyond them",
        unit="us",
        compute=compute,
        rivals={},
    )
    trip = MICRO * statistics.median(trips)
    measure.row.notes += [
        f"a round trip to a parked worker in the same rounds: {trip:.3g} us",
        f"one step after the other, without a pause: {MICRO * statistics.median(at_once):.3g} us",
    ]
    measure.row.rivals["round trip"] = rival(trip, measure.row.ours)
    measure.row.rank()


def rival(other: float, ours: float | None) -> RivalResult:
    return RivalResult(median=other, ratio=other / ours if ours else None)
