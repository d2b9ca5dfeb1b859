"""A CUDA device that computes experts beside the CPU.

Two streams: one brings weights to slots, the other computes. An expert's weights come in two tiles,
gate with up and then down, an event behind each: its first half begins when the first is there.

Axes: l layers, t tokens, m hidden width, n rows of one step, a token of an expert each.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from quernstone import _core, _cuda
from quernstone.moe.cache.base import whole
from quernstone.moe.cost import CostModel, Curve, profile_machine
from quernstone.moe.cuda_streams import Backend, Streams, bytes_of
from quernstone.moe.devices import Work
from quernstone.moe.experts import Experts, ExpertsShape
from quernstone.moe.schedule import Interval

Pinning = Literal["register", "given", "bounce"]
"""How weights leave the host. `register`: from where they are, which is pinned at `open`. `given`:
from where they are, which is pinned already. `bounce`: through pinned memory of two experts, which
costs the host a copy; for files that are mapped and systems that pin no more."""

FEW = 8
"""Tokens of an expert up to which its weights are read by the kernels for few tokens."""
LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOGETHER = 4


@dataclass
class _Slot:
    """Of the device's memory."""

    offset: int
    arrived: list[Any] = field(default_factory=list)
    """Events of the tiles of the last load, when it has begun."""
    left: Any = None
    """Event behind the last computation."""
    pending: _Load | None = None
    """A load that has not begun."""


@dataclass(eq=False)
class _Load:
    layer: int
    expert: int
    slot: _Slot


@dataclass
class _Span:
    """Work between two events."""

    resource: str
    label: str
    begin: Any
    end: Any


class CudaDevice:
    """A `Device` on a CUDA GPU.

    Experts with few tokens go to the CUDA kernels, which have the bits of the CPU's arithmetic with
    activations of 8 bits; the others to the Triton kernels, in bf16. With `reproducible` all go to
    the first. Results do not depend on what is loaded when. Not to be called from two threads at
    once.

    A load begins at once while fewer than `in_flight` are on their way, and else when one of them
    has arrived and the device is called again, or when it is needed; until then it can be
    cancelled.

    Args:
        device: as torch names it.
        pinning: how weights leave the host.
        in_flight: loads on their way at once, 1 or more.
        costs: of an expert, of any shape; None measures them.
        backend: what stands for the device in tests.

    Raises:
        ValueError: no such device, an argument out of its range.
    """

    emulated = False

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        pinning: Pinning = "register",
        in_flight: int = 4,
        costs: CostModel | None = None,
        backend: Backend | None = None,
    ) -> None:
        if pinning not in get_args(Pinning):
            raise ValueError(f"pinning: got {pinning!r}, expected one of {get_args(Pinning)}")
        self._pinning = pinning
        self._in_flight = whole("in_flight", in_flight, 1)
        self._costs = costs
        self._backend: Backend = Streams(device) if backend is None else backend
        self._open = False
        self._layers: list[Experts]
        self._memory: Tensor | None
        self._slots: dict[tuple[int, int], _Slot]
        self._staging: list[_Slot]
        self._pinned: list[Experts]
        self._bounce: list[tuple[Tensor, list[Any]]]
        self._pending: deque[_Load]
        self._flying: list[Any]
        self._outputs: list[tuple[Tensor, Any]]
        self._x: list[tuple[Tensor, dict[torch.dtype, Tensor]]]
        self._spans: list[_Span]
        self._sources: list[Tensor]
        self._reset()

    @property
    def name(self) -> str:
        return self._backend.name

    def costs(self, shape: ExpertsShape) -> CostModel:
        """Measured here: the CPU's, the kernels that this device runs and its bus."""
        if self._costs is None:
            self._costs = measured_costs(shape, self._backend, few=self._few)
        return self._costs

    def open(
        self, layers: Sequence[Experts], slots: Sequence[int], staging: int, *, reproducible: bool
    ) -> None:
        """As `Device.open`.

        Raises:
            MemoryError: the device has not so much; or the system pins no more, and `pinning` is
                "register".
            ValueError: bf16 with `reproducible`.
            ImportError: `reproducible` without the CUDA kernels.
        """
        if self._open:
            raise ValueError("device: got one that a runtime has open, expected one of its own")
        for i, of in enumerate(layers):
            if reproducible and of.shape.format == "bf16":
                raise ValueError(f"layers[{i}]: got 'bf16', expected int8 or int4, reproducible")
        if reproducible and self._backend.device.type == "cuda":
            _cuda.required()
        largest = max(of.shape.expert_bytes for of in layers)
        sizes = [of.shape.expert_bytes for of in layers]
        total = sum(n * size for n, size in zip(slots, sizes, strict=True)) + staging * largest
        self._memory = self._backend.empty(max(total, 64))
        self._layers, self._reproducible = list(layers), reproducible
        at = 0
        for layer, (count, size) in enumerate(zip(slots, sizes, strict=True)):
            for slot in range(count):
                self._slots[layer, slot] = _Slot(at)
                at += size
        self._staging = [_Slot(at + i * largest) for i in range(staging)]
        self._open = True
        try:
            self._pin(largest)
            self._bus, self._compute = self._backend.queue(), self._backend.queue()
            self._origin = self._compute.record()
            self._backend.synchronize()
        except BaseException:
            self.close()
            raise
        self._clock = time.perf_counter()

    def begin(self) -> None:
        self._expect_open()
        self._pump()

    def load(self, layer: int, expert: int, slot: int) -> None:
        self._expect_open()
        count = self._layers[layer].shape.count
        if not 0 <= expert < count:
            raise ValueError(f"expert: got {expert}, expected 0 to {count - 1}")
        load = _Load(layer, expert, self._slot(layer, slot))
        if load.slot.pending is not None:
            self._begin_until(load.slot.pending)
        load.slot.pending = load
        self._pending.append(load)
        self._pump()

    def cancel(self, layer: int, slot: int) -> bool:
        self._expect_open()
        self._pump()
        found = self._slot(layer, slot)
        if found.pending is None:
            return False
        self._pending.remove(found.pending)
        found.pending = None
        return True

    def compute(self, layer: int, x: Tensor, work: Sequence[Work]) -> None:
        self._expect_open()
        shape = self._layers[layer].shape
        if x.ndim != 2 or x.shape[1] != shape.hidden:
            raise ValueError(f"x.shape: got {tuple(x.shape)}, expected (t, {shape.hidden})")
        there = self._bring(x)
        total = sum(len(one.tokens) for one in work)
        room = self._backend.pinned((total, shape.hidden), torch.float32)
        starts = np.cumsum([0, *(len(one.tokens) for one in work)]).tolist()
        # What is there goes first and together; what is on its way one by one, as it arrives.
        batches: dict[tuple[int, bool], list[int]] = {}
        for i, one in enumerate(work):
            if not len(one.tokens):
                continue
            found = self._slot(layer, one.slot)
            if found.pending is not None:
                self._begin_until(found.pending)
            if not found.arrived:
                raise ValueError(
                    f"slot: got {one.slot} of layer {layer}, expected one with weights"
                )
            late = i if any(not event.done() for event in found.arrived) else -1
            batches.setdefault((late, self._few(shape, len(one.tokens))), []).append(i)
        for (_, few), chosen in sorted(batches.items()):
            results = self._queue(layer, [work[i] for i in chosen], there, few=few)
            places = _merged([(starts[i], starts[i + 1]) for i in chosen])
            self._compute.run(partial(_copy_back, results, places, room))
        self._outputs.append((room, self._compute.record()))

    def collect(self) -> Tensor:
        self._expect_open()
        found, self._outputs = self._outputs, []
        self._x.clear()
        for _, event in found:
            event.wait()
        self._pump()
        rooms = [room for room, _ in found]
        if not rooms:
            return torch.empty(0, self._layers[0].shape.hidden, dtype=torch.float32, device="cpu")
        return rooms[0] if len(rooms) == 1 else torch.cat(rooms)

    def abort(self) -> None:
        if not self._open:
            return
        for load in self._pending:
            load.slot.pending = None
        self._pending.clear()
        self._outputs.clear()
        self._x.clear()
        self._backend.synchronize()
        for slot in (*self._slots.values(), *self._staging):
            slot.arrived = []
        self._flying.clear()
        self._spans.clear()

    def times(self) -> list[Interval]:
        """As `Device.times`; experts that were computed together are one interval."""
        self._expect_open()
        found: list[Interval] = []
        kept: list[_Span] = []
        for span in self._spans:
            if not span.end.done():
                kept.append(span)
                continue
            begin, end = (
                self._clock + e.seconds_after(self._origin) for e in (span.begin, span.end)
            )
            kind = "compute" if span.resource == "gpu" else "transfer"
            found.append((span.resource, begin, end, span.label, kind))
        self._spans = kept
        return found

    def close(self) -> None:
        if not self._open:
            return
        self.abort()
        for of in self._pinned:
            self._backend.unpin(of.data)
        self._open = False
        self._reset()

    def _reset(self) -> None:
        self._layers = []
        self._reproducible = False
        self._memory = None
        self._slots = {}
        self._staging = []
        self._pinned = []
        self._bounce = []
        self._pending = deque()
        self._flying = []
        self._outputs = []
        self._x = []
        self._spans = []
        self._sources = []

    def _expect_open(self) -> None:
        if not self._open:
            raise ValueError("device: got one that is closed, expected an open one")

    def _slot(self, layer: int, slot: int) -> _Slot:
        if 0 > slot >= -len(self._staging):
            return self._staging[-1 - slot]
        if (layer, slot) not in self._slots:
            count = sum(1 for of, _ in self._slots if of == layer)
            raise ValueError(
                f"slot: got {slot} of layer {layer}, expected {-len(self._staging)} to {count - 1}"
            )
        return self._slots[layer, slot]

    def _pin(self, largest: int) -> None:
        self._sources = [bytes_of(of.data) for of in self._layers]
        if self._pinning == "bounce":
            self._bounce = [(self._backend.pinned((largest,), torch.uint8), []) for _ in range(2)]
        if self._pinning != "register":
            return
        for i, of in enumerate(self._layers):
            if any(of.data is other.data for other in self._pinned):
                continue
            if not self._backend.pin(of.data):
                raise MemoryError(
                    f"layers[{i}]: got {of.shape.nbytes} bytes that the system does not pin, "
                    "expected memory that it does; pinning='bounce' needs none"
                )
            self._pinned.append(of)

    def _pump(self) -> None:
        """Begins loads while there is room."""
        self._flying = [event for event in self._flying if not event.done()]
        while self._pending and len(self._flying) < self._in_flight:
            self._begin(self._pending.popleft())

    def _begin_until(self, load: _Load) -> None:
        while load.slot.pending is load:
            self._begin(self._pending.popleft())

    def _begin(self, load: _Load) -> None:
        slot, shape = load.slot, self._layers[load.layer].shape
        slot.pending = None
        if slot.left is not None:
            self._bus.wait(slot.left)
        assert self._memory is not None
        source = self._sources[load.layer][load.expert * shape.expert_bytes :][: shape.expert_bytes]
        target = self._memory[slot.offset : slot.offset + shape.expert_bytes]
        used: list[Any] = []
        if self._bounce:
            room, used = self._bounce.pop(0)
            for event in used:
                event.wait()
            used = []
            self._bounce.append((room, used))
            source = room[: shape.expert_bytes].copy_(source)
        begun = self._bus.record()
        slot.arrived = []
        cut = first_tile(shape)
        for part in (slice(0, cut), slice(cut, None)):
            to, of = target[part], source[part]
            self._bus.run(lambda to=to, of=of: to.copy_(of, non_blocking=True))
            slot.arrived.append(self._bus.record())
        used += slot.arrived
        self._flying.append(slot.arrived[-1])
        label = f"{load.layer}.{load.expert}"
        self._spans.append(_Span("pcie", label, begun, slot.arrived[-1]))

    def _bring(self, x: Tensor) -> dict[torch.dtype, Tensor]:
        """x on the device by dtype, brought once a step."""
        for of, brought in self._x:
            if of is x:
                return brought
        there: dict[torch.dtype, Tensor] = {}
        self._x.append((x, there))
        self._backend.after_caller(self._compute, x)
        here = x
        if x.device.type == "cpu":
            here = self._backend.pinned(x.shape, x.dtype).copy_(x)

        def bring() -> None:
            there[torch.float32] = here.to(self._backend.device, torch.float32, non_blocking=True)

        self._compute.run(bring)
        return there

    def _few(self, shape: ExpertsShape, tokens: int) -> bool:
        """Whether the kernels for few tokens compute an expert of so many."""
        if shape.format == "bf16":
            return False
        available = self._backend.device.type != "cuda" or _cuda.available()
        return self._reproducible or (available and tokens <= FEW)

    def _queue(
        self, layer: int, work: Sequence[Work], there: dict[torch.dtype, Tensor], *, few: bool
    ) -> list[Tensor]:
        """Queues experts that are computed together; the list will hold their rows."""
        shape = self._layers[layer].shape
        slots = [self._slot(layer, one.slot) for one in work]
        results: list[Tensor] = []
        calls: list[Any] = []
        offsets = [slot.offset for slot in slots]
        counts = [len(one.tokens) for one in work]
        tokens = np.concatenate([one.tokens for one in work])

        def first_half() -> None:
            make: Callable[..., Any] = self._backend.few if few else self._backend.grouped
            dtype = torch.float32 if few else torch.bfloat16
            if dtype not in there:
                there[dtype] = there[torch.float32].to(dtype)
            x = there[dtype]
            calls.append(make(shape, self._memory, offsets, counts, tokens, x))
            calls[0].gate_up()

        def second_half() -> None:
            results.append(calls.pop().down())

        for slot in slots:
            for event in slot.arrived[:1]:
                self._compute.wait(event)
        begun = self._compute.record()
        self._compute.run(first_half)
        for slot in slots:
            for event in slot.arrived[1:]:
                self._compute.wait(event)
        self._compute.run(second_half)
        ended = self._compute.record()
        for slot in slots:
            slot.left = ended
        label = " ".join(f"{layer}.{one.expert}" for one in work)
        self._spans.append(_Span("gpu", label, begun, ended))
        return results


def _merged(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals that follow each other as one."""
    found: list[tuple[int, int]] = []
    for begin, end in places:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def _copy_back(results: list[Tensor], places: list[tuple[int, int]], room: Tensor) -> None:
    rows = results.pop()
    at = 0
    for begin, end in places:
        room[begin:end].copy_(rows[at : at + end - begin], non_blocking=True)
        at += end - begin


def first_tile(shape: ExpertsShape) -> int:
    """Bytes of an expert's gate and up, which lie before its down."""
    inputs, outputs = shape.hidden, shape.intermediate
    return 2 * _core.Layout(shape.format, outputs, inputs, shape.group, shape.zero_points).bytes


def measured_costs(
    shape: ExpertsShape,
    backend: Backend,
    *,
    few: Callable[[ExpertsShape, int], bool],
    loads: Sequence[int] = LOADS,
    rounds: int = 9,
) -> CostModel:
    """What an expert costs on the CPU, and with the device's own kernels and bus.

    Times of the device are the host's, from the call to the end: that of four experts at once,
    divided by four.

    Args:
        shape: of the experts; its count is not used.
        backend: of the device.
        few: which kernels an expert of so many tokens takes.
        loads: tokens to measure at, rising.
        rounds: of each measurement, 3 or more.
    """
    model = profile_machine(shape, gpu="a6000-xeon10", tokens=loads, rounds=rounds)
    size = shape.expert_bytes
    memory = backend.empty(_TOGETHER * size)
    here = backend.pinned((size,), torch.uint8)
    queue = backend.queue()

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(rounds + 1):
            backend.synchronize()
            begin = time.perf_counter()
            queue.run(work)
            queue.record().wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    here.zero_()
    transfer = seconds(lambda: memory[:size].copy_(here, non_blocking=True))
    # Zeros everywhere: no time depends on a weight's value.
    queue.run(memory.zero_)

    def experts(load: int) -> None:
        is_few = few(shape, load)
        x = torch.zeros(load, shape.hidden, dtype=torch.float32, device=backend.device)
        tokens = np.tile(np.arange(load), _TOGETHER)
        offsets = [i * size for i in range(_TOGETHER)]
        call = (backend.few if is_few else backend.grouped)(
            shape, memory, offsets, [load] * _TOGETHER, tokens, x if is_few else x.bfloat16()
        )
        call.gate_up()
        call.down()

    gpu = Curve(tuple(loads), tuple(seconds(partial(experts, load)) / _TOGETHER for load in loads))
    note = f"{model.note.split(';')[0]}; GPU: {backend.name}, the kernels that run"
    return replace(model, gpu=gpu, transfer=transfer, gpu_source="measured", note=note)
