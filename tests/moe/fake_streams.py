"""A device whose queues run in any order that their waits allow, on CPU tensors.

What is queued runs when somebody waits for it, or by chance when an event is asked. Whoever forgets
a wait reads memory before it was written, or after it was overwritten.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.moe import Experts, ExpertsShape

Order = Literal["random", "first", "last"]
"""Which queue goes on: any, or while it need not wait the one that was made first, or last."""


class FakeEvent:
    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.at: float | None = None

    def done(self) -> bool:
        self.backend.by_chance()
        return self.at is not None

    def wait(self) -> None:
        self.backend.run_until(lambda: self.at is not None)

    def seconds_after(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return self.at - other.at


class FakeQueue:
    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.steps: deque[Callable[[], object] | FakeEvent] = deque()

    def run(self, work: Callable[[], object]) -> None:
        self.steps.append(work)

    def wait(self, event: FakeEvent) -> None:
        self.steps.append(event)

    def record(self) -> FakeEvent:
        event = FakeEvent(self.backend)

        def happen() -> None:
            event.at = self.backend.now

        self.steps.append(happen)
        return event

    def step(self) -> bool:
        """Does the next thing, if it has not to wait."""
        if not self.steps:
            return False
        first = self.steps[0]
        if isinstance(first, FakeEvent):
            if first.at is None:
                return False
            self.steps.popleft()
            return True
        self.steps.popleft()
        first()
        return True


class FakeCall:
    """The CPU's experts in the place of kernels: weights are read by halves, as kernels do."""

    def __init__(
        self,
        shape: ExpertsShape,
        memory: Tensor,
        offsets: Sequence[int],
        counts: Sequence[int],
        tokens: NDArray[np.int64],
        x: Tensor,
    ) -> None:
        self.shape, self.memory, self.x = shape, memory, x
        self.offsets, self.counts, self.tokens = list(offsets), list(counts), tokens
        self.first: list[Tensor] = []

    def gate_up(self) -> None:
        from quernstone.moe.cuda_device import first_tile

        cut = first_tile(self.shape)
        self.first = [self.memory[at : at + cut].clone() for at in self.offsets]

    def down(self) -> Tensor:
        size = self.shape.expert_bytes
        one = Experts.empty(ExpertsShape(**(self.shape.to_dict() | {"count": 1})))
        rows, begin = [], 0
        for at, count, first in zip(self.offsets, self.counts, self.first, strict=True):
            one.data[:] = self.memory[at : at + size].numpy()
            one.data[: len(first)] = first.numpy()
            x = self.x[torch.from_numpy(self.tokens[begin : begin + count])].float()
            ids = torch.zeros(count, 1, dtype=torch.int64)
            rows.append(one(x, ids, torch.ones(count, 1)))
            begin += count
        return torch.cat(rows)


class FakeBackend:
    device = torch.device("cpu")
    name = "a fake device"

    def __init__(
        self,
        seed: int,
        memory: int = 1 << 30,
        pinnable: int = 1 << 30,
        order: Order = "random",
    ) -> None:
        self.random = random.Random(seed)
        self.order = order
        self.memory, self.pinnable = memory, pinnable
        self.queues: list[FakeQueue] = []
        self.now = 0.0
        self.pinned_bytes = 0
        self.kinds: list[tuple[str, list[int]]] = []

    def queue(self) -> FakeQueue:
        self.queues.append(FakeQueue(self))
        return self.queues[-1]

    def by_chance(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 3))):
            self.advance()

    def advance(self) -> bool:
        """One step of some queue; whether there was one."""
        self.now += 1.0
        turn = list(self.queues)
        if self.order == "random":
            self.random.shuffle(turn)
        elif self.order == "last":
            turn.reverse()
        return any(queue.step() for queue in turn)

    def run_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert self.advance(), "every queue waits for another one"

    def synchronize(self) -> None:
        self.run_until(lambda: not any(queue.steps for queue in self.queues))

    def empty(self, size: int) -> Tensor:
        if size > self.memory:
            raise MemoryError(f"slots: got {size} bytes, expected at most {self.memory} bytes")
        room = np.full(size + 64, 0xFF, np.uint8)
        return torch.from_numpy(room[-room.ctypes.data % 64 :][:size])

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        room = torch.empty(tuple(shape), dtype=dtype)
        return room.fill_(float("nan")) if dtype.is_floating_point else room.fill_(255)

    def pin(self, data: NDArray[np.uint8]) -> bool:
        self.pinned_bytes += data.nbytes
        return self.pinned_bytes <= self.pinnable

    def unpin(self, data: NDArray[np.uint8]) -> None:
        self.pinned_bytes -= data.nbytes

    def after_caller(self, queue: FakeQueue, x: Tensor) -> None:
        pass

    def few(self, shape: ExpertsShape, *arguments: Any) -> FakeCall:
        self.kinds.append(("few", list(arguments[2])))
        return FakeCall(shape, *arguments)

    def grouped(self, shape: ExpertsShape, *arguments: Any) -> FakeCall:
        self.kinds.append(("grouped", list(arguments[2])))
        return FakeCall(shape, *arguments)
