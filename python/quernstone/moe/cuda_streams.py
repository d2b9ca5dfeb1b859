"""What a device of experts asks of CUDA: queues, events, memory. `Streams` is torch's; tests have
one that runs what is queued in any order that the waits allow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.moe import cuda_experts
from quernstone.moe.experts import ExpertsShape


class Event(Protocol):
    """A place in a queue."""

    def done(self) -> bool:
        """Whether everything before it is."""
        ...

    def wait(self) -> None:
        """Until then, on the host."""
        ...

    def seconds_after(self, other: Any) -> float:
        """Both are done."""
        ...


class Queue(Protocol):
    """Work in the order in which it comes."""

    def run(self, work: Callable[[], object]) -> None:
        """Calls `work`, now or when its turn has come; what it starts on the device is queued."""
        ...

    def wait(self, event: Any) -> None:
        """What is queued from now on waits for the event."""
        ...

    def record(self) -> Any:
        """An event behind what was queued until now."""
        ...


class Call(Protocol):
    """Experts in two halves."""

    def gate_up(self) -> None: ...

    def down(self) -> Tensor: ...


class Backend(Protocol):
    """One device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def name(self) -> str: ...

    def queue(self) -> Any: ...

    def empty(self, size: int) -> Tensor:
        """Bytes on the device at an address divisible by 64. Raises MemoryError."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies need not wait for. Raises MemoryError."""
        ...

    def pin(self, data: NDArray[np.uint8]) -> bool:
        """Pins memory that is there; whether the system did."""
        ...

    def unpin(self, data: NDArray[np.uint8]) -> None: ...

    def after_caller(self, queue: Any, x: Tensor) -> None:
        """Has the queue wait for what the caller has queued, of which x is made."""
        ...

    def few(self, shape: ExpertsShape, *arguments: Any) -> Call:
        """`cuda_experts.few_tokens`"""
        ...

    def grouped(self, shape: ExpertsShape, *arguments: Any) -> Call:
        """`triton_experts.grouped_experts`"""
        ...

    def synchronize(self) -> None: ...


class StreamEvent:
    """A CUDA event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_after(self, other: StreamEvent) -> float:
        return float(other.event.elapsed_time(self.event)) * 1e-3


class StreamQueue:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def wait(self, event: StreamEvent) -> None:
        self.stream.wait_event(event.event)

    def record(self) -> StreamEvent:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return StreamEvent(event)


class Streams:
    """A CUDA device by way of torch."""

    def __init__(self, device: str | torch.device = "cuda") -> None:
        wanted = torch.device(device)
        if wanted.type != "cuda":
            raise ValueError(f"device: got {device}, expected a CUDA device")
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {device}, expected one that torch sees: it sees none")
        named = str(wanted) != "cuda"
        self.device = wanted if named else torch.device("cuda", torch.cuda.current_device())

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def queue(self) -> StreamQueue:
        return StreamQueue(self.device)

    def empty(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryError(
                f"slots: got {size} bytes, expected at most {free} bytes, which {self.name} has "
                f"free of {total}"
            ) from None

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise MemoryError(f"pinned memory: got none ({error})") from None

    def pin(self, data: NDArray[np.uint8]) -> bool:
        flags = 0 if data.flags.writeable else 8  # cudaHostRegisterReadOnly
        with torch.cuda.device(self.device):
            done = torch.cuda.cudart().cudaHostRegister(data.ctypes.data, data.nbytes, flags)
        return int(done) == 0

    def unpin(self, data: NDArray[np.uint8]) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(data.ctypes.data)

    def after_caller(self, queue: StreamQueue, x: Tensor) -> None:
        if x.is_cuda:
            queue.stream.wait_stream(torch.cuda.current_stream(self.device))
            x.record_stream(queue.stream)

    def few(self, shape: ExpertsShape, *arguments: Any) -> Call:
        return cuda_experts.few_tokens(shape, *arguments)

    def grouped(self, shape: ExpertsShape, *arguments: Any) -> Call:
        from quernstone.moe import triton_experts  # Triton may not be installed

        return triton_experts.grouped_experts(shape, *arguments)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def bytes_of(data: NDArray[np.uint8]) -> Tensor:
    """The same memory as a tensor, which is not written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped file cannot be
        return torch.from_numpy(data)
