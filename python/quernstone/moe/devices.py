"""What computes experts beside the CPU: the interface, and a device that is emulated.

Axes: t tokens, m hidden width, n rows of one step, a token of an expert each.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone import _core
from quernstone._checks import number
from quernstone.moe.cache.base import whole
from quernstone.moe.cost import PRESETS, CostModel, Curve
from quernstone.moe.experts import Experts, ExpertsShape
from quernstone.moe.schedule import Interval


class Work(NamedTuple):
    """An expert that a device is to compute."""

    expert: int
    slot: int
    """Where its weights are, or will be when what was loaded before has arrived."""
    tokens: NDArray[np.int64]
    """[k] rows of x, rising."""


@runtime_checkable
class Device(Protocol):
    """A second processor with a memory of its own, cut into slots of an expert each.

    `load` and `compute` only queue and return at once. What concerns one slot happens in the order
    of the calls: a computation waits for the load before it, a load for the computations before it.
    Slots are numbered by layer, 0 to slots[layer] - 1; the negative ones, -1 to -staging, belong
    to all layers and hold experts that are not kept.

    Any method may raise; a step that fails is given up with `abort`, and no output is made of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def emulated(self) -> bool:
        """Its times are made up, as every title and row then says."""
        ...

    def costs(self, shape: ExpertsShape) -> CostModel:
        """What an expert of this shape costs here and on the CPU, in real seconds."""
        ...

    def open(
        self, layers: Sequence[Experts], slots: Sequence[int], staging: int, *, reproducible: bool
    ) -> None:
        """Takes memory for so many slots of each layer, and the staging ones of the largest.

        It keeps nothing where it fails.

        Raises:
            ValueError: it is open already.
            MemoryError: the device has not so much.
        """
        ...

    def begin(self) -> None:
        """A step begins: work will come soon, and `collect` ends it."""
        ...

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Queues the copy of an expert's packed weights into a slot."""
        ...

    def cancel(self, layer: int, slot: int) -> bool:
        """Takes the last load of a slot back if it has not begun; whether it was taken back."""
        ...

    def compute(self, layer: int, x: Tensor, work: Sequence[Work]) -> None:
        """Queues experts, in this order.

        Args:
            layer: whose experts they are.
            x: [t, m] fp32, contiguous, on the CPU or on the device; it stays as it is until
                `collect`.
            work: what to compute of which rows.
        """
        ...

    def collect(self) -> Tensor:
        """Waits for everything that was queued by `compute` since the last call.

        Returns:
            [n, m] fp32 on the CPU, contiguous: down(silu(gate(x)) * up(x)) of each row, without the
            router's weight; in the order of the calls, of their work and of its tokens. Valid until
            the next `compute`.
        """
        ...

    def abort(self) -> None:
        """Drops what is queued and waits for what is not; the contents of slots are undefined."""
        ...

    def times(self) -> list[Interval]:
        """What was done since the last call, by the clock of `time.perf_counter`, in seconds.

        Resources are "gpu" and "pcie", kinds "compute" and "transfer", as in `Schedule.intervals`;
        labels are "layer.expert". A device that does not record returns none.
        """
        ...

    def close(self) -> None:
        """Gives everything back; may be called twice."""
        ...


class EmulatedDevice:
    """A GPU that is not there: its queues and its results are real, its times are emulated.

    One worker copies weights to slots, another computes with them, by the CPU's own experts; each
    then waits until the time is up that the model gives a device. Times of the model, those of
    the CPU too, are multiplied by one factor, which makes the shortest of them longer than the
    work that is really done. Ratios of times mean something, times do not.

    Args:
        costs: what an expert takes on the machine that is emulated, or its name in `PRESETS`.
        factor: of all times; None measures one at `open`.
        most_tokens: of one expert, for which the measured factor is to do.
        memory: bytes that the device has; None: enough.

    Raises:
        ValueError: an unknown name, a factor or number out of its range.
    """

    emulated = True

    def __init__(
        self,
        costs: CostModel | str = "a6000-xeon10",
        *,
        factor: float | None = None,
        most_tokens: int = 8,
        memory: int | None = None,
    ) -> None:
        if isinstance(costs, str) and costs not in PRESETS:
            raise ValueError(f"costs: got {costs!r}, expected one of {', '.join(PRESETS)}")
        if factor is not None and not number("factor", factor) > 0.0:
            raise ValueError(f"factor: got {factor}, expected a positive number")
        self.factor = factor
        self._given = costs
        self._most_tokens = whole("most_tokens", most_tokens, 1)
        self._memory = None if memory is None else whole("memory", memory)
        self._opened: _Opened | None = None
        self._timed = True

    @property
    def name(self) -> str:
        machine = self._given if isinstance(self._given, str) else self._given.note or "a device"
        scaled = "" if self.factor is None else f", times x{self.factor:g}"
        return f"{machine}, emulated{scaled}"

    def costs(self, shape: ExpertsShape) -> CostModel:
        if isinstance(self._given, str):
            return CostModel.of_machine(PRESETS[self._given], shape)
        return self._given

    def open(
        self, layers: Sequence[Experts], slots: Sequence[int], staging: int, *, reproducible: bool
    ) -> None:
        if self._opened is not None:
            raise ValueError("device: got one that a runtime has open, expected one of its own")
        size = sum(n * of.shape.expert_bytes for n, of in zip(slots, layers, strict=True))
        size += staging * max(of.shape.expert_bytes for of in layers)
        if self._memory is not None and size > self._memory:
            raise MemoryError(
                f"slots: got {tuple(slots)} and {staging} for all layers, {size} bytes, expected "
                f"at most {self._memory} bytes, the memory of {self.name}"
            )
        costs = self.costs(layers[0].shape)
        if self.factor is None:
            self.factor = measured_factor(layers, costs, self._most_tokens)
        # Layers of one runtime may differ in format, and all compute alike.
        compute = layers[0].compute
        pairs = [(of.shape.layout(), of.data) for of in layers]
        core = _core.moe.EmulatedDevice(pairs, list(slots), staging, compute)
        self._opened = _Opened(core, costs.gpu, costs.transfer, self.factor)

    @property
    def core(self) -> _core.moe.EmulatedDevice | None:
        """What a whole step may be given to; None for a class that overrides how it is done."""
        return self._open().core if type(self) is EmulatedDevice else None

    def begin(self) -> None:
        self._open().core.begin()

    def load(self, layer: int, expert: int, slot: int) -> None:
        core, _, transfer, factor = self._open()
        core.load(layer, expert, slot, factor * transfer if self._timed else 0.0)

    def cancel(self, layer: int, slot: int) -> bool:
        return self._open().core.cancel(layer, slot)

    def compute(self, layer: int, x: Tensor, work: Sequence[Work]) -> None:
        core, curve, _, factor = self._open()
        rows = x.numpy()
        seconds = (factor * curve([len(one.tokens) for one in work])).tolist()
        for one, length in zip(work, seconds, strict=True):
            core.compute(layer, one.expert, one.slot, rows, one.tokens, length)

    def collect(self) -> Tensor:
        return torch.from_numpy(self._open().core.collect())

    def abort(self) -> None:
        if self._opened is not None:
            self._opened.core.abort()

    def times(self) -> list[Interval]:
        return [
            (resource, start, end, f"{layer}.{expert}", _KINDS[resource])
            for resource, start, end, layer, expert in self._open().core.times()
        ]

    @property
    def late(self) -> int:
        """How often the work took longer than its emulated time, which then is too long."""
        return self._open().core.late

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Loads within take no emulated time: for what was there before the clock started."""
        self._timed = False
        try:
            yield
        finally:
            self._timed = True

    def close(self) -> None:
        self.abort()
        self._opened = None

    def _open(self) -> _Opened:
        if self._opened is None:
            raise ValueError("device: got one that is closed, expected an open one")
        return self._opened


class _Opened(NamedTuple):
    core: _core.moe.EmulatedDevice
    gpu: Curve
    transfer: float
    factor: float


_KINDS = {"gpu": "compute", "pcie": "transfer"}
_SHORTEST = 1e-3
_MARGIN = 2.0


def measured_factor(layers: Sequence[Experts], costs: CostModel, most_tokens: int) -> float:
    """What to multiply times by, so that each is twice the real work's and a millisecond."""
    loads = [1 << i for i in range(most_tokens.bit_length())]
    shortest = min(costs.gpu([1])[0], costs.cpu_seconds([1])[0], costs.transfer)
    ratio = _SHORTEST / shortest
    for experts in {of.shape: of for of in layers}.values():
        data = experts.data[: experts.shape.expert_bytes]
        one = Experts(replace(experts.shape, count=1), data, experts.compute)
        moved = _seconds(one.data.copy)
        ratio = max(ratio, _MARGIN * moved / costs.transfer)
        for load in loads:
            x = torch.zeros(load, experts.shape.hidden, dtype=torch.float32, device="cpu")
            ids = torch.zeros(load, 1, dtype=torch.int64, device="cpu")
            weights = torch.ones(load, 1, dtype=torch.float32, device="cpu")
            with one_thread():
                took = _seconds(functools.partial(one, x, ids, weights))
            least = min(costs.gpu([load])[0], costs.cpu_seconds([load])[0])
            ratio = max(ratio, _MARGIN * took / least)
    # Two digits: it is printed.
    return float(f"{ratio:.1e}") * (1.0 if float(f"{ratio:.1e}") >= ratio else 1.1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], Any]) -> float:
    """The middle of five."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
