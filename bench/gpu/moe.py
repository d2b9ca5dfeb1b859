"""Experts on one device and beside the CPU: kernels against memory, schedules against schedules.

Weights are random packed bytes, whose values no time depends on. Routing is replayed from traces of
small trained models; hidden states are random and on the host. Attention and all else of a model is
left out.

Axes: l layers, s steps, t tokens of a step, e experts, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone import _core
from quernstone.bench.gpu.clock import Clock
from quernstone.bench.rows import LimitResult, RivalResult, Row, Spread, quantile
from quernstone.bench.tinylm import experts as tiny
from quernstone.moe import MODELS, CostModel, Experts, ExpertsShape, Runtime, Trace, reference
from quernstone.moe.cuda_device import FEW, CudaDevice, measured_costs
from quernstone.moe.cuda_streams import Backend
from quernstone.moe.devices import Device, Work

Phase = Literal["decode", "prefill"]
PERCENT = (25, 50, 75)
PREFILL_TOKENS = 128
# At most 8, and no more than 4 GiB of weights, which have to be pinned.
LAYERS = {"deepseek-v2-lite": 8, "qwen2-57b-a14b": 4, "mixtral-8x7b": 4}
THREADS = 10
LOADS = (1, 2, 4, 8, 16, 32, 64, 128)
KERNEL_TOKENS = (1, 4, 64)
# Distinct experts: the others are copies of them.
DISTINCT = 4
SECONDS = 210.0
LEFT_OUT = "left out"
FIXED, ON_DEMAND, ALL_CPU = "fixed mapping", "on demand", "all CPU"
TORCH = "torch bf16"
SYSTEMS: tuple[tuple[str, Any, Any], ...] = (
    ("ours", "hybrid", "reuse"),
    (FIXED, "fixed", "lru"),
    (ON_DEMAND, "gpu_only", "lru"),
    (ALL_CPU, "cpu_only", None),
)
# Kernels for few tokens have the CPU's bits; those in bf16 round weights and activations.
TOLERANCE = {"few": 0.03, "grouped": 2**-7, "decode": 0.0, "prefill": 0.03}


@dataclass(frozen=True)
class KernelCase:
    """Every active expert of a layer with the same number of tokens."""

    model: str
    tokens: int
    shape: ExpertsShape
    active: int

    @property
    def id(self) -> str:
        return f"moe.gpu.kernel.int4g32.{self.model}.t{self.tokens}"


@dataclass(frozen=True)
class BusCase:
    """The transfer of an expert."""

    model: str
    shape: ExpertsShape

    @property
    def id(self) -> str:
        return f"moe.gpu.transfer.int4g32.{self.model}"


@dataclass(frozen=True)
class HybridCase:
    """Layers that run on the CPU and the device, steps of a replayed trace."""

    model: str
    phase: Phase
    percent: int
    shape: ExpertsShape
    top_k: int
    layers: int

    @property
    def id(self) -> str:
        return f"moe.gpu.{self.phase}.int4g32.{self.model}.cache{self.percent}"

    @property
    def slots(self) -> int:
        return max(1, self.shape.count * self.percent // 100)


Case = KernelCase | BusCase | HybridCase


def cases() -> list[Case]:
    """Kernels first; then model by model, so that weights are made once."""
    found: list[Case] = []
    for name in LAYERS:
        of = MODELS[name]
        shape = ExpertsShape(of.experts, of.hidden, of.intermediate)
        for tokens in KERNEL_TOKENS:
            active = of.top_k if tokens == 1 else of.experts
            found.append(KernelCase(name, tokens, shape, active))
        found.append(BusCase(name, shape))
        found += [
            HybridCase(name, phase, percent, shape, of.top_k, LAYERS[name])
            for phase in ("decode", "prefill")
            for percent in PERCENT
        ]
    return found


@dataclass(frozen=True)
class Machine:
    """The device and how long measuring may take."""

    backend: Backend
    make: Callable[[CostModel], Device]
    rounds: int = 9
    seconds: float = SECONDS
    loads: Sequence[int] = LOADS
    clock: Callable[[], float] = time.monotonic


def cuda_machine(device: torch.device) -> Machine:
    from quernstone.moe.cuda_streams import Streams

    backend = Streams(device)
    return Machine(backend, lambda costs: CudaDevice(costs=costs, pinning="given", backend=backend))


def measure(chosen: Iterable[Case], machine: Machine) -> Iterator[Row]:
    """One row a case; one with a wrong result, or without time left, says so and has no figure."""
    end = machine.clock() + machine.seconds
    before = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    try:
        for case in chosen:
            row = Row(case.id, "moe", "", "ms", torch.get_num_threads())
            if machine.clock() >= end:
                row.notes.append(f"{LEFT_OUT}: the rows before took {machine.seconds:.0f} s")
            elif isinstance(case, KernelCase):
                _kernel(case, machine, row)
            elif isinstance(case, BusCase):
                _bus(case, machine, row)
            else:
                _hybrid(case, machine, row)
            yield row
    finally:
        torch.set_num_threads(before)
        _layers.cache_clear()
        _costs.cache_clear()


def left_out(row: Row) -> bool:
    """Whether there was no time for a row."""
    return any(note.startswith(LEFT_OUT) for note in row.notes)


# Kernels ------------------------------------------------------------------------------------------


def _kernel(case: KernelCase, machine: Machine, row: Row) -> None:
    backend, shape = machine.backend, case.shape
    device = backend.device
    few = case.tokens <= FEW
    kernels = backend.few if few else backend.grouped
    row.threads = 0
    row.what = (
        f"int4 experts, {case.active} with {case.tokens} token(s) each, m {shape.hidden}, "
        f"f {shape.intermediate}, {'CUDA, activations of 8 bits' if few else 'Triton, bf16'}"
    )
    experts = _layers(shape, 1, False)[0]
    memory = backend.empty(shape.nbytes)
    memory.copy_(torch.from_numpy(experts.data))
    generator = torch.Generator().manual_seed(0)
    tokens = np.tile(np.arange(case.tokens), case.active)
    x = torch.randn(case.tokens, shape.hidden, generator=generator).to(device)
    x = x if few else x.bfloat16()
    counts = [case.tokens] * case.active
    # Other experts in every call, so that none is found in the device's cache.
    turn = itertools.count()

    def run() -> Tensor:
        first = next(turn) * case.active
        offsets = [(first + i) % shape.count * shape.expert_bytes for i in range(case.active)]
        call = kernels(shape, memory, offsets, counts, tokens, x)
        call.gate_up()
        return call.down()

    matrices = [experts.matrices(i) for i in range(min(2, case.active))]
    got = _complete(machine, run)[: case.tokens * len(matrices)]
    ids = torch.arange(len(matrices)).repeat_interleave(case.tokens)[:, None]
    few_rows = x.float().cpu().repeat(len(matrices), 1)
    want = reference.experts(matrices, few_rows, ids, torch.ones(ids.shape))
    row.error = relative(got, want)
    allowed = TOLERANCE["few" if few else "grouped"]
    if not row.error <= allowed:
        row.notes.append(f"wrong: error {row.error:.3g}, expected at most {allowed:.3g}")
        return
    runs: dict[str, Callable[[], object]] = {"ours": run}
    row.rivals[TORCH] = RivalResult()
    try:
        runs[TORCH] = _in_torch(case, matrices[0], x, device)
    except torch.cuda.OutOfMemoryError as error:
        row.rivals[TORCH].absent = f"not timed: {error}"[:200]
    moved = shape.expert_bytes * case.active
    work = 6.0 * shape.hidden * shape.intermediate * case.tokens * case.active
    read, multiplied = _stream(device), _matmul(device)
    runs["limit"] = read[0] if few else multiplied[0]
    times = Clock(device, machine.rounds).alternate(runs)
    own = times["ours"]
    _fill(row, own, {TORCH: times[TORCH]} if TORCH in times else {})
    row.work |= {"bytes": moved, "operations": work}
    rate = (read if few else multiplied)[1] / quantile(times["limit"], 0.5)
    done = (moved if few else work) / quantile(own, 0.5)
    unit, scale = ("GB/s", 1e9) if few else ("TFLOP/s", 1e12)
    name = "copy of 1 GiB, bytes read and written" if few else f"torch.mm bf16 {SIDE}^3"
    row.limit = LimitResult(name, rate / scale, unit)
    row.percent_of_limit = 100 * done / rate
    row.notes.append(
        f"{done / scale:.4g} {unit} of weights" if few else f"{done / scale:.4g} {unit}"
    )


SIDE = 8192


def _stream(device: torch.device) -> tuple[Callable[[], object], float]:
    """What moves memory, and how many bytes."""
    size = 1 << (29 if device.type == "cuda" else 16)
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: there.copy_(here), 2.0 * size


def _matmul(device: torch.device) -> tuple[Callable[[], object], float]:
    side = SIDE if device.type == "cuda" else 64
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda: torch.mm(left, right), 2.0 * side**3


def _in_torch(
    case: KernelCase, matrices: tuple[Tensor, Tensor, Tensor], x: Tensor, device: torch.device
) -> Callable[[], object]:
    """Experts in bf16 as batched products of torch, from as many distinct weights as are active."""
    gate, up, down = (matrix.to(device).bfloat16() for matrix in matrices)
    both = torch.cat([gate, up]).T.expand(case.active, -1, -1).contiguous()
    last = down.T.expand(case.active, -1, -1).contiguous()
    tokens = x.bfloat16().expand(case.active, -1, -1).contiguous()

    def run() -> Tensor:
        left, right = torch.bmm(tokens, both).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(left) * right, last)

    return run


def _bus(case: BusCase, machine: Machine, row: Row) -> None:
    backend, size = machine.backend, case.shape.expert_bytes
    row.threads = 0
    row.what = f"an expert of {size / 1e6:.1f} MB from pinned memory to a slot, in two tiles"
    layers = _layers(case.shape, 1, True)
    device = machine.make(_costs(machine, case.shape))
    device.open(layers, [2], 0, reproducible=False)
    big = 1 << (28 if backend.device.type == "cuda" else 16)
    there, here = backend.empty(big), backend.pinned((big,), torch.uint8)
    queue = backend.queue()
    times: dict[str, list[float]] = {"ours": [], "limit": []}
    x, one = torch.zeros(1, case.shape.hidden), np.zeros(1, np.int64)
    for turn in range(machine.rounds + 1):
        device.times()
        device.load(0, turn % case.shape.count, turn % 2)
        # A load is over, at the latest, when what needs it is.
        device.compute(0, x, [Work(turn % case.shape.count, turn % 2, one)])
        device.collect()
        spans = [end - begin for kind, begin, end, *_ in device.times() if kind == "pcie"]
        begin = time.perf_counter()
        queue.run(lambda: there.copy_(here, non_blocking=True))
        queue.record().wait()
        took = time.perf_counter() - begin
        if turn:
            times["ours"] += spans
            times["limit"].append(took)
    device.close()
    _fill(row, times["ours"], {})
    row.work |= {"bytes": size}
    rate = big / quantile(times["limit"], 0.5)
    row.limit = LimitResult(f"pinned copy of {big >> 20} MiB", rate / 1e9, "GB/s")
    row.percent_of_limit = 100 * size / row_seconds(row) / rate


# Schedules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one step asks of each layer."""

    x: Tensor
    ids: list[Tensor]
    weights: list[Tensor]
    scores: list[Tensor]


@functools.cache
def routing(experts: int, top_k: int) -> Trace:
    """A trace of trained routers with so many experts, theirs folded where they have more."""
    name = "top2of16" if experts < 64 else "top6of64"
    trace = tiny.load_trace(name)
    assert trace.scores is not None
    scores = trace.scores[..., : trace.experts // experts * experts].astype(np.float32)
    folded = scores.reshape(*scores.shape[:2], -1, experts).sum(axis=2)
    return Trace.of(folded, top_k, meta={"name": name})


def steps(case: HybridCase, number: int, device: torch.device) -> list[Step]:
    """The first ones of the trace; layers beyond the trace's take turns with its own."""
    trace = routing(case.shape.count, case.top_k)
    tokens = 1 if case.phase == "decode" else PREFILL_TOKENS
    generator = torch.Generator().manual_seed(1)
    found = []
    assert trace.scores is not None
    for step in range(number):
        chosen = np.arange(step * tokens, (step + 1) * tokens) % trace.tokens
        x = torch.randn(tokens, case.shape.hidden, generator=generator)
        ids, weights, scores = [], [], []
        for layer in range(case.layers):
            likely = torch.from_numpy(trace.scores[layer % trace.layers, chosen].astype(np.float32))
            which = torch.from_numpy(trace.ids[layer % trace.layers, chosen].astype(np.int64))
            ids.append(which)
            weights.append(likely.gather(1, which))
            scores.append(likely)
        found.append(Step(x.to(device), ids, weights, scores))
    return found


def _hybrid(case: HybridCase, machine: Machine, row: Row) -> None:
    tokens = 1 if case.phase == "decode" else PREFILL_TOKENS
    row.what = (
        f"{case.layers} layers of {case.model}'s experts in int4, {tokens} token(s) a step, "
        f"{case.percent} % of the experts on the device"
    )
    layers = {str(i): of for i, of in enumerate(_layers(case.shape, case.layers, True))}
    costs = _costs(machine, case.shape)
    per_round, warm = (8, 4) if case.phase == "decode" else (1, 1)
    script = steps(case, per_round * machine.rounds + warm, torch.device("cpu"))
    systems: dict[str, Runtime] = {}
    try:
        for name, policy, cache in SYSTEMS:
            made = None if cache is None else machine.make(costs)
            if made is None:
                systems[name] = Runtime(layers)
                continue
            systems[name] = Runtime(
                layers, made, costs=costs, policy=policy, cache=cache, slots=case.slots
            )
            _place(systems[name], case, script)
        outputs = {
            name: [_run(system, step) for step in script[:warm]] for name, system in systems.items()
        }
        want = outputs[ALL_CPU]
        errors = {
            name: max(relative(a, b.double()) for a, b in zip(found, want, strict=True))
            for name, found in outputs.items()
        }
        row.error = max(errors.values())
        allowed = TOLERANCE[case.phase]
        if not row.error <= allowed:
            row.notes.append(f"wrong: {errors}, expected at most {allowed:.3g}")
            return
        times: dict[str, list[float]] = {name: [] for name in systems}
        names = list(systems)
        for turn in range(machine.rounds):
            part = script[warm + turn * per_round :][:per_round]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                for step in part:
                    _run(systems[name], step)
                times[name].append((time.perf_counter() - begin) / per_round)
    finally:
        for system in systems.values():
            system.close()
    rivals = {name: sample for name, sample in times.items() if name != "ours"}
    _fill(row, times["ours"], rivals)
    row.notes += [
        f"per layer: {row_seconds(row) / case.layers * 1e3:.3f} ms",
        f"an expert, {costs.gpu_source}: CPU {1e3 * costs.cpu_seconds([1])[0]:.3f} ms, device "
        f"{1e3 * costs.gpu([1])[0]:.3f} ms, bus {1e3 * costs.transfer:.3f} ms",
        f"routing of {routing(case.shape.count, case.top_k).meta['name']}; the fixed mapping has "
        "the experts that are used most",
    ]


def _place(system: Runtime, case: HybridCase, script: Sequence[Step]) -> None:
    """The experts that the script uses most: a fixed mapping at its best."""
    for layer in range(case.layers):
        used = torch.cat([step.ids[layer].flatten() for step in script])
        counts = torch.bincount(used, minlength=case.shape.count)
        system.place(str(layer), counts.argsort(descending=True)[: case.slots].tolist())


def _run(system: Runtime, step: Step) -> Tensor:
    """Of every layer the result, one beside the other."""
    return torch.stack(
        [
            system.layer(str(layer))(step.x, ids, step.weights[layer], step.scores[layer])
            for layer, ids in enumerate(step.ids)
        ]
    )


# What rows share ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _layers(shape: ExpertsShape, count: int, pinned: bool) -> list[Experts]:
    """Layers of random packed bytes, in pinned memory where there is a device."""
    found = []
    for seed in range(count):
        cuda = pinned and torch.cuda.is_available()
        room = torch.empty(shape.nbytes + 64, dtype=torch.uint8, pin_memory=cuda).numpy()
        data = room[-room.ctypes.data % 64 :][: shape.nbytes]
        parts = data.reshape(shape.count, shape.expert_bytes)
        if seed == 0:
            for i in range(min(DISTINCT, shape.count)):
                parts[i] = packed_bytes(shape, seed=i)
        for i in range(DISTINCT if seed == 0 else 0, shape.count):
            first = parts if seed == 0 else found[0].data.reshape(parts.shape)
            parts[i] = first[(i + seed) % min(DISTINCT, shape.count)]
        found.append(Experts(shape, data))
    return found


def packed_bytes(shape: ExpertsShape, seed: int) -> NDArray[np.uint8]:
    """An expert of random codes, int4 in groups of 32 with one scale for all of a matrix."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, shape.expert_bytes, np.uint8)
    across = 2 * _core.Layout("int4", shape.intermediate, shape.hidden, 32, False).bytes
    for part, inputs in ((data[:across], shape.hidden), (data[across:], shape.intermediate)):
        padded = -(-inputs // 32) * 32
        blocks = part.reshape(-1, 9 * padded)  # 8 bytes of codes an input, and 1 of scales
        # Codes less 8 have a deviation of 4.6.
        scale = torch.tensor(inputs**-0.5 / 4.6).bfloat16().view(torch.int16).item()
        blocks[:, 8 * padded :] = np.frombuffer(np.int16(scale).tobytes() * (padded // 2), np.uint8)
    return data


@functools.lru_cache(maxsize=1)
def _costs(machine: Machine, shape: ExpertsShape) -> CostModel:
    return measured_costs(
        shape,
        machine.backend,
        few=lambda _, load: load <= FEW,
        loads=machine.loads,
        rounds=max(3, machine.rounds // 2),
    )


def _complete(machine: Machine, run: Callable[[], Tensor]) -> Tensor:
    found = run()
    machine.backend.synchronize()
    return found.float().cpu()


def _fill(row: Row, own: Sequence[float], others: dict[str, list[float]]) -> None:
    spread = Spread.of(own).scaled(1e3)
    row.ours, row.p20, row.p80 = spread.median, spread.p20, spread.p80
    row.work["rounds"] = len(own)
    for name, sample in others.items():
        result = row.rivals.setdefault(name, RivalResult())
        result.pair(sample, own, 1e3)
    row.rank()


def row_seconds(row: Row) -> float:
    assert row.ours is not None
    return row.ours * 1e-3


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30))
