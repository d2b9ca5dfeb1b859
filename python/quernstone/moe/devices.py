"""What computes experts beside the CPU: the interface, and a device that is emulated.

Axes: t tokens, m hidden width, n rows of one step, a token of an expert each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quernstone.moe.cost import CostModel
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

        Raises:
            MemoryError: the device has not so much.
        """
        ...

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Queues the copy of an expert's packed weights into a slot."""
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
