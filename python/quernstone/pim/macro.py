"""How a bit-serial macro is built and driven, and how a layer lies on several of them.

Axes: o outputs, i inputs of a layer; v vectors; t cycles; r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Order = Literal["lsb", "msb"]
MAX_BITS = 16
MAX_ROWS = 1 << 16
MAX_BANKS = 1 << 16
MAX_IDLE = 1 << 16


@dataclass(frozen=True)
class Macro:
    """A macro of `rows` word lines and `banks` adder trees, one input bit a row and cycle.

    Bank j holds the weights of one output, `weight_bits` cells for each row. In a cycle every row
    line carries one bit of its input, and a cell product changes where the line changes and the
    cell holds a one.

    A layer [o, i] larger than a macro is tiled: output o is bank `o % banks` of bank tile
    `o // banks`, input i is row `i % rows` of row tile `i // rows`. Cells that a layer does not
    fill hold zeros and count among the cells of a rate; their lines never change.

    Args:
        rows: of a macro, 1 to 65536.
        banks: of a macro, 1 to 65536.
        weight_bits, input_bits: 1 to 16.
        weight_signed, input_signed: two's complement, or from 0. One signed bit is 0 or -1.
        order: of the input bits in time, the lowest ("lsb") or the highest ("msb") first.
        cross_vector: whether the last bit of a vector against the first of the next counts. The
            lines are at 0 before the first vector. Without, the first bit of a vector toggles
            nothing, as if every vector were the only one.
        zero_gating: a row whose input is 0 keeps its line where it was for that vector.
        idle: cycles after each vector in which all lines are at 0; needs `cross_vector`.

    Raises:
        ValueError: a field is out of range or contradicts another.
        TypeError: a field of another type.
    """

    rows: int = 512
    banks: int = 64
    weight_bits: int = 8
    input_bits: int = 8
    weight_signed: bool = True
    input_signed: bool = True
    order: Order = "lsb"
    cross_vector: bool = True
    zero_gating: bool = False
    idle: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rows", 1, MAX_ROWS),
            ("banks", 1, MAX_BANKS),
            ("weight_bits", 1, MAX_BITS),
            ("input_bits", 1, MAX_BITS),
            ("idle", 0, MAX_IDLE),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an int")
            if not least <= value <= most:
                raise ValueError(f"{name}: got {value}, expected {least} to {most}")
        for name in ("weight_signed", "input_signed", "cross_vector", "zero_gating"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a bool")
        if self.order not in get_args(Order):
            raise ValueError(f"order: got {self.order!r}, expected one of {get_args(Order)}")
        if self.idle and not self.cross_vector:
            raise ValueError(f"idle: got {self.idle} without cross_vector, expected 0")

    @property
    def bank_cells(self) -> int:
        """Cells of one bank: the most products that a bank can toggle in a cycle."""
        return self.rows * self.weight_bits

    @property
    def cells(self) -> int:
        """Cells of the whole macro."""
        return self.banks * self.bank_cells

    @property
    def cycles_per_vector(self) -> int:
        """Cycles from the first bit of a vector to the first of the next."""
        return self.input_bits + self.idle

    def tiles(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Tiles of rows and of banks that a layer of that size takes."""
        return -(-inputs // self.rows), -(-outputs // self.banks)

    def padding(self, outputs: int, inputs: int) -> float:
        """Share of the cells of those tiles that the layer does not fill."""
        rows, banks = self.tiles(outputs, inputs)
        total = rows * banks * self.rows * self.banks
        return 1 - outputs * inputs / total if total else 0.0


@dataclass(frozen=True, eq=False)
class Count:
    """Something counted, and how many cells it was counted among.

    Args:
        counts: integers, exact.
        cells: of each of the counts, padding included where a macro was named.
    """

    counts: NDArray[Any]
    cells: int

    @property
    def rate(self) -> NDArray[np.float64]:
        """Counts per cell, 0 to 1."""
        return np.asarray(self.counts / self.cells, dtype=np.float64)
