"""The codes that a number may become, and where one gives way to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernstone.pim.api import hamming_weights

_PER_STEP = 64
# Tables grow with the price: 0.2 GB at this one, which no 8-bit code outweighs.
_MOST_PRICE = 1e5


@dataclass(frozen=True)
class Codebook:
    """Rounding to the code whose squared error plus `price` x ones is least, of all codes.

    The error counts in steps. As `quant.Rounding` with that penalty and a reach of all codes, but
    one look into a table: the codes that win anywhere do so in intervals, whose thresholds are
    taken to the next 64th of a step.

    Args:
        bits: of a signed code, 2 to 16.
        shift: added to a code before it is stored; the ones are those of the stored code.
        price: of a one, in squared steps, 0 or more; 0 rounds to the nearest code.
        codes: [c] that win somewhere, ascending, without the shift.
        first: the position where `table` begins, in 64ths of a step.
        table: the code of each 64th of a step.
    """

    bits: int
    shift: int
    price: float
    codes: Tensor
    first: int
    table: Tensor

    @classmethod
    def of(cls, bits: int, shift: int = 0, price: float = 0.0) -> Codebook:
        """The codebook of all codes. Raises ValueError where an argument is out of range."""
        if not 2 <= bits <= 16:
            raise ValueError(f"bits: got {bits}, expected 2 to 16")
        most = (1 << (bits - 1)) - 1
        if abs(shift) > most:
            raise ValueError(f"shift: got {shift}, expected {-most} to {most}")
        if not 0 <= price <= _MOST_PRICE:
            raise ValueError(f"price: got {price}, expected 0 to {_MOST_PRICE:.0f}")
        stored = np.arange(-most - 1, most + 1)
        cost = price * hamming_weights(stored, bits).astype(np.float64)
        codes = (stored - shift).astype(np.float64)
        kept = [0]
        edges: list[float] = []
        for i in range(1, len(codes)):
            while True:
                # Where parabolas around codes a < b, lifted by their costs, meet.
                a = kept[-1]
                edge = (codes[a] + codes[i]) / 2 + (cost[i] - cost[a]) / (2 * (codes[i] - codes[a]))
                if not edges or edge > edges[-1]:
                    break
                kept.pop()
                edges.pop()
            kept.append(i)
            edges.append(edge)
        ends = [round(edge * _PER_STEP) for edge in edges]
        runs = np.diff([ends[0] - 1, *ends, ends[-1] + 1])
        table = np.repeat(codes[kept], runs).astype(np.float32)
        won = codes[kept][runs > 0].astype(np.float32)
        return cls(bits, shift, price, torch.from_numpy(won), ends[0] - 1, torch.from_numpy(table))

    def round(self, position: Tensor) -> Tensor:
        """Codes without the shift, as floats, of positions: value / scale."""
        if self.price == 0:
            return position.round().clamp_(self.codes[0].item(), self.codes[-1].item())
        at = position.mul(_PER_STEP).sub_(self.first).clamp_(0, len(self.table) - 1).int()
        return self.table.index_select(0, at.flatten()).view(position.shape)
