"""What an expert costs where: measured on this machine, or from published figures of another.

All times are in seconds.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from quernstone import _document
from quernstone._checks import number
from quernstone.machine import Figure, Machine
from quernstone.moe.experts import Experts, ExpertsShape
from quernstone.moe.schedule import Layer

_FORMAT, _VERSION = "quernstone.moe.cost", 1


class ModelShape(NamedTuple):
    """The routed experts of a published model."""

    hidden: int
    intermediate: int
    experts: int
    """Of a layer."""
    top_k: int
    layers: int
    """That have experts."""


MODELS: Mapping[str, ModelShape] = {
    "mixtral-8x7b": ModelShape(4096, 14336, 8, 2, 32),
    "deepseek-v2-lite": ModelShape(2048, 1408, 64, 6, 26),
    "qwen2-57b-a14b": ModelShape(3584, 2560, 64, 8, 28),
}
"""By their configurations: arXiv 2401.04088, 2405.04434, 2407.10671."""


def _machine(
    name: str,
    gpu: tuple[float, float, str],
    link: tuple[float, str],
    cpu: tuple[float, Literal["published", "assumed"], str],
) -> Machine:
    """A machine of GPU (GB/s, TFLOP/s, words), link (GB/s, words) and CPU (GB/s, tag, words)."""
    return Machine(
        name,
        {
            "gpu.read_bandwidth": Figure(gpu[0], "GB/s", "published", f"{gpu[2]} memory"),
            "gpu.rate": Figure(
                gpu[1], "TFLOP/s", "published", f"{gpu[2]}, fp16 tensor cores, dense"
            ),
            "gpu.read_share": Figure(0.8, "1", "assumed", "of the bandwidth, reading weights"),
            "gpu.rate_share": Figure(0.5, "1", "assumed", "of the rate, int4 products"),
            "gpu.launch": Figure(10.0, "us", "assumed", "kernel launches of an expert"),
            "link.bandwidth": Figure(link[0], "GB/s", "published", link[1]),
            "link.share": Figure(0.8, "1", "assumed", "of the bandwidth, pinned copies"),
            "cpu.read_bandwidth": Figure(cpu[0], "GB/s", cpu[1], cpu[2]),
            "cpu.read_share": Figure(0.6, "1", "assumed", "of the bandwidth, ten cores reading"),
            "cpu.rate": Figure(0.5, "TFLOP/s", "assumed", "int4 products on ten cores"),
            "cpu.wake": Figure(60.0, "us", "assumed", "hand-over to the workers, once a layer"),
        },
    )


_PCIE4 = (31.5, "PCIe 4.0 x16: 16 GT/s, 128b/130b")
_PCIE5 = (63.0, "PCIe 5.0 x16: 32 GT/s, 128b/130b")
PRESETS: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        _machine(
            "a6000-xeon10",
            (768.0, 154.8, "RTX A6000"),
            _PCIE4,
            (128.0, "published", "Xeon Gold 5220R: six channels of DDR4-2667"),
        ),
        _machine(
            "rtx4090",
            (1008.0, 165.2, "RTX 4090"),
            _PCIE4,
            (76.8, "assumed", "a desktop: two channels of DDR5-4800"),
        ),
        _machine(
            "h100",
            (3350.0, 989.4, "H100 SXM"),
            _PCIE5,
            (307.2, "assumed", "a server: eight channels of DDR5-4800"),
        ),
    )
}
"""Machines by name. `a6000-xeon10` is that of HybriMoE's evaluation (arXiv 2504.05897), of whose
processor ten cores are used; its figures, like all here, are of the makers or assumed, not measured
by anyone on an expert."""


_MOST_TOKENS = 2**53  # float64 counts no further


@dataclass(frozen=True)
class Curve:
    """Seconds by tokens: straight between its points, and beyond the last as before it."""

    tokens: tuple[int, ...]
    """Rising."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise ValueError(
                f"seconds: got {len(self.seconds)} for {len(self.tokens)} tokens, expected one "
                "for each, one at least"
            )
        if any(isinstance(t, bool) or not isinstance(t, int) for t in self.tokens):
            raise TypeError(f"tokens: got {self.tokens}, expected ints")
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if self.tokens[0] < 1 or not rising:
            raise ValueError(f"tokens: got {self.tokens}, expected rising numbers from 1 on")
        if self.tokens[-1] > _MOST_TOKENS:
            raise ValueError(f"tokens: got {self.tokens[-1]}, expected at most 2^53")
        for value in self.seconds:
            if not number("seconds", value) > 0.0:
                raise ValueError(f"seconds: got {value}, expected a positive number")

    def __call__(self, loads: ArrayLike) -> NDArray[np.float64]:
        x = np.asarray(loads, np.float64)
        found = np.interp(x, self.tokens, self.seconds)
        if len(self.tokens) > 1:
            (a, b), (low, high) = self.tokens[-2:], self.seconds[-2:]
            found += np.maximum(x - b, 0.0) * max(0.0, high - low) / (b - a)
        else:
            found *= np.maximum(x / self.tokens[0], 1.0)
        return found


@dataclass(frozen=True)
class CostModel:
    """Times of one expert on the CPU, on the GPU and on the bus.

    Args:
        shape: of the layer whose experts they are.
        cpu, gpu: by the tokens of an expert.
        cpu_first: on top for the first expert of a layer on the CPU.
        transfer: of an expert's bytes to the GPU.
        cpu_source, gpu_source: "measured", "published" or "assumed"; the transfer's is the GPU's.
        scale: what the CPU's times are multiplied by, as `observed` found it.
        note: where and how.
    """

    shape: ExpertsShape
    cpu: Curve
    gpu: Curve
    cpu_first: float
    transfer: float
    cpu_source: str
    gpu_source: str
    scale: float = 1.0
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("cpu_first", "transfer", "scale"):
            value = number(name, getattr(self, name))
            if value < 0.0 or (name == "scale" and value == 0.0):
                raise ValueError(f"{name}: got {value}, expected a number that is not negative")
        for name in ("cpu_source", "gpu_source"):
            if getattr(self, name) not in ("measured", "published", "assumed"):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected 'measured', 'published' or "
                    "'assumed'"
                )

    def cpu_seconds(self, loads: ArrayLike) -> NDArray[np.float64]:
        """[n] of experts with so many tokens, without `cpu_first`."""
        return self.scale * self.cpu(loads)

    def layer_seconds(self, loads: ArrayLike) -> float:
        """Of a layer whose experts are all computed on the CPU."""
        x = np.asarray(loads)
        return float(self.cpu_seconds(x).sum() + self.scale * self.cpu_first) if x.size else 0.0

    def layer(self, loads: ArrayLike, ready: ArrayLike, **starts: float) -> Layer:
        """The activated experts of a layer with their costs, as the scheduler takes them.

        Args:
            loads: [n] tokens of each.
            ready: [n] bool, or times, see `Layer`.
            starts: cpu_free, gpu_free, pcie_free.
        """
        return Layer(
            loads,
            ready,
            self.cpu_seconds(loads),
            self.gpu(loads),
            self.transfer,
            cpu_first=self.scale * self.cpu_first,
            **starts,
        )

    def observed(self, loads: ArrayLike, seconds: float, *, rate: float = 0.1) -> CostModel:
        """The model after a layer of these loads took the CPU so long.

        What changes while a program runs, clocks and neighbours on the memory bus, changes all
        times alike; so one factor is followed, by an exponential mean of measured over predicted.

        Args:
            loads: [n] tokens of each expert.
            seconds: what the layer took.
            rate: weight of this observation, above 0 and up to 1.

        Raises:
            ValueError: a time or rate out of its range, no expert.
        """
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate: got {rate}, expected above 0 and up to 1")
        if not number("seconds", seconds) > 0.0:
            raise ValueError(f"seconds: got {seconds}, expected a positive number")
        predicted = self.layer_seconds(loads)
        if not predicted:
            raise ValueError("loads: got none, expected one at least")
        return replace(self, scale=self.scale * (seconds / predicted) ** rate)

    @classmethod
    def of_machine(cls, machine: Machine, shape: ExpertsShape) -> CostModel:
        """Costs from a machine's figures: what is slower, reading the weights or multiplying.

        Args:
            machine: one of `PRESETS`, or with figures of the same names.
            shape: of the experts.

        Raises:
            ValueError: a figure is missing, contradicts another or gives no time that float64
                holds.
        """
        for share in ("gpu.read_share", "gpu.rate_share", "link.share", "cpu.read_share"):
            if machine.value(share, "1") > 1.0:
                raise ValueError(
                    f"machine {machine.name!r}: {share} is {machine.figure(share)}, expected at "
                    "most 1"
                )
        size, work = shape.expert_bytes, 6.0 * shape.hidden * shape.intermediate

        def of(device: str, rate: float, extra: float) -> Curve:
            bandwidth = machine.value(f"{device}.read_bandwidth", "B/s")
            share = machine.value(f"{device}.read_share", "1")
            try:
                read = size / (bandwidth * share)
                # The tokens on either side of the bend, and some on the slope beyond it.
                bend = max(1.0, read * rate / work)
                tokens = sorted({1, math.floor(bend), math.ceil(bend), 2 * math.ceil(bend)})
                seconds = [extra + max(read, work * t / rate) for t in tokens]
                return Curve(tuple(tokens), tuple(seconds))
            except (ArithmeticError, ValueError) as error:
                raise ValueError(
                    f"machine {machine.name!r}: got figures of {device}.* that give no times "
                    f"({error})"
                ) from error

        gpu_rate = machine.value("gpu.rate", "FLOP/s") * machine.value("gpu.rate_share", "1")
        link = machine.value("link.bandwidth", "B/s") * machine.value("link.share", "1")
        if not link > 0.0 or not math.isfinite(size / link):
            raise ValueError(f"machine {machine.name!r}: got figures of link.* that give no time")
        return cls(
            shape,
            cpu=of("cpu", machine.value("cpu.rate", "FLOP/s"), 0.0),
            gpu=of("gpu", gpu_rate, machine.value("gpu.launch", "s")),
            cpu_first=machine.value("cpu.wake", "s"),
            transfer=size / link,
            cpu_source="assumed",
            gpu_source="assumed",
            note=f"{machine.name}: makers' figures and assumed shares of them",
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it; `from_json` gives an equal model back."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "shape": self.shape.to_dict(),
            "cpu": {"tokens": list(self.cpu.tokens), "seconds": list(self.cpu.seconds)},
            "gpu": {"tokens": list(self.gpu.tokens), "seconds": list(self.gpu.seconds)},
            "cpu_first": self.cpu_first,
            "transfer": self.transfer,
            "cpu_source": self.cpu_source,
            "gpu_source": self.gpu_source,
            "scale": self.scale,
            "note": self.note,
        }

    @classmethod
    def from_json(cls, data: Any) -> CostModel:
        """The model of `to_json`.

        Raises:
            ValueError: another format or version; a field that is missing, unknown, of another type
                or out of its range.
        """
        found = _document.body(data, _FORMAT, _VERSION, **_FIELDS)
        for name in ("cpu", "gpu"):
            fields = _document.fields(found[name], name, tokens=list, seconds=list)
            points = [tuple(fields[part]) for part in ("tokens", "seconds")]
            found[name] = _within(name, functools.partial(Curve, *points))
        shape = _document.fields(found["shape"], "shape", **_SHAPE_FIELDS)
        found["shape"] = _within("shape", lambda: ExpertsShape(**shape))
        return cls(**found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as JSON; a file of that name stays whole until it is replaced."""
        _document.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Reads what `save` wrote.

        Raises:
            ValueError: as `from_json`, with the path before the field; no JSON.
            OSError: the file cannot be read.
        """
        return _document.read(path, cls.from_json)


_FIELDS: dict[str, type] = {
    "shape": dict,
    "cpu": dict,
    "gpu": dict,
    "cpu_first": float,
    "transfer": float,
    "cpu_source": str,
    "gpu_source": str,
    "scale": float,
    "note": str,
}
_SHAPE_FIELDS: dict[str, type] = {
    "count": int,
    "hidden": int,
    "intermediate": int,
    "format": str,
    "group": int,
    "zero_points": bool,
}


def _within(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.{error}") from error


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COLD_BYTES = 256 << 20
_TOGETHER = 4


def profile_machine(
    shape: ExpertsShape,
    *,
    gpu: Machine | str | None = None,
    tokens: Sequence[int] | None = None,
    rounds: int = 15,
    seed: int = 0,
) -> CostModel:
    """Measures what experts of a shape cost on this CPU, and with a GPU there.

    Experts are taken in rotation from more memory than any cache holds, so each is read from DRAM
    as it would be in a model. A call with one expert tells the start of a layer, one with four
    what each more of them adds; medians over rounds. Numbers of threads are torch's.

    Args:
        shape: of the experts; its count is not used.
        gpu: a machine, or the name of one in `PRESETS`, whose published figures stand for the GPU
            and the bus. None measures those of this machine, and takes "a6000-xeon10" if there is
            none: the computation there is that of torch in bf16.
        tokens: at which loads to measure, rising; None is `TOKENS`.
        rounds: of each measurement, 3 or more.
        seed: of weights and tokens.

    Returns:
        A `CostModel` that says of each part whether it was measured.

    Raises:
        ValueError: an argument out of its range, an unknown name.

    Source: the warm-up phase of HybriMoE, arXiv 2504.05897.
    """
    if rounds < 3:
        raise ValueError(f"rounds: got {rounds}, expected 3 or more")
    if isinstance(gpu, str):
        if gpu not in PRESETS:
            raise ValueError(f"gpu: got {gpu!r}, expected one of {', '.join(PRESETS)}")
        gpu = PRESETS[gpu]
    points = TOKENS if tokens is None else tuple(tokens)
    loads = Curve(points, (1.0,) * len(points)).tokens
    cpu, first = _profile_cpu(shape, loads, rounds, seed)
    measured = gpu is None and torch.cuda.is_available()
    if measured:
        device, transfer = _profile_device(shape, loads, rounds, torch.device("cuda"))
        words = f"{torch.cuda.get_device_name()}, experts by torch in bf16"
    else:
        machine = gpu or PRESETS["a6000-xeon10"]
        other = CostModel.of_machine(machine, shape)
        device, transfer, words = other.gpu, other.transfer, other.note
    return CostModel(
        shape,
        cpu,
        device,
        first,
        transfer,
        cpu_source="measured",
        gpu_source="measured" if measured else "assumed",
        note=f"CPU here, {torch.get_num_threads()} threads; GPU: {words}",
    )


def cold_experts(shape: ExpertsShape, *, seed: int = 0) -> Experts:
    """Experts of a shape in more memory than a cache holds, the same weights in all of them."""
    count = max(2 * _TOGETHER, -(-_COLD_BYTES // shape.expert_bytes))
    experts = Experts.empty(replace(shape, count=count))
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = shape.intermediate, shape.hidden
    sizes = ((wide, narrow), (wide, narrow), (narrow, wide))
    gate, up, down = (
        torch.randn(*size, generator=generator).mul_(size[1] ** -0.5) for size in sizes
    )
    experts.place(0, gate, up, down)
    size = experts.shape.expert_bytes
    experts.data.reshape(count, size)[1:] = experts.data[:size]
    return experts


def _profile_cpu(
    shape: ExpertsShape, loads: tuple[int, ...], rounds: int, seed: int
) -> tuple[Curve, float]:
    experts = cold_experts(shape, seed=seed)
    count = experts.shape.count
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_TOGETHER * loads[-1], shape.hidden, generator=generator)
    turn = 0

    def seconds(together: int, load: int) -> float:
        nonlocal turn
        rows = x[: together * load]
        ids = (torch.arange(together).repeat_interleave(load)[:, None] + turn) % count
        turn += together
        weights = torch.ones(len(rows), 1, dtype=torch.float32)
        begin = time.perf_counter()
        experts(rows, ids, weights)
        return time.perf_counter() - begin

    # Round by round, so that a slow spell of the machine reaches every load alike.
    calls = [(together, load) for load in loads for together in (1, _TOGETHER)]
    times: dict[tuple[int, int], list[float]] = {call: [] for call in calls}
    for call in calls:
        seconds(*call)
    for _ in range(rounds):
        for call in calls:
            times[call].append(seconds(*call))
    median = {call: statistics.median(each) for call, each in times.items()}

    found = []
    first = 0.0
    for load in loads:
        alone, several = median[1, load], median[_TOGETHER, load]
        each = max((several - alone) / (_TOGETHER - 1), several / _TOGETHER / 2)
        if load == loads[0]:
            first = max(0.0, alone - each)
        # What several take, less the start: the slope alone forgets how they share the threads.
        found.append(max(1e-9, (several - first) / _TOGETHER))
    return Curve(loads, tuple(found)), first


def _profile_device(
    shape: ExpertsShape, loads: tuple[int, ...], rounds: int, device: torch.device
) -> tuple[Curve, float]:
    """The curve of experts in bf16 on a device, and the time of an expert's bytes to it."""
    here = torch.empty(shape.expert_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(here, device=device)

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(rounds + 1):
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    transfer = seconds(lambda: there.copy_(here, non_blocking=True))
    both = torch.zeros(2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16, device=device)
    down = torch.zeros(shape.hidden, shape.intermediate, dtype=torch.bfloat16, device=device)

    def expert(x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(x, both).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)

    found = []
    for load in loads:
        x = torch.zeros(load, shape.hidden, dtype=torch.bfloat16, device=device)
        found.append(seconds(functools.partial(expert, x)))
    return Curve(loads, tuple(found)), transfer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
