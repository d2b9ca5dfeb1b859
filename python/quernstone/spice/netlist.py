"""A netlist: nodes, and the two-terminal elements between them as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quernstone.spice.error import SpiceError
from quernstone.spice.grammar import PLACE_BITS
from quernstone.spice.waves import Wave

GROUND = 0
"""The index of node "0", which "gnd" names too."""


@dataclass(frozen=True, eq=False, repr=False)
class Branches:
    """The elements of one kind, in the order of the file.

    Axes: m elements.
    """

    names: tuple[str, ...]
    plus: NDArray[np.int32]
    """[m] node indices; a current source drives current from `plus` through itself to `minus`."""
    minus: NDArray[np.int32]
    """[m]"""
    values: NDArray[np.float64]
    """[m] ohm, farad, henry, volt or ampere; of a source its value at direct current."""
    places: NDArray[np.int64]
    """[m] file << 32 | line"""
    waves: Mapping[int, Wave] = field(default_factory=dict)
    """Of sources that change with time, by their position."""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Branches of {len(self)}>"


@dataclass(frozen=True, eq=False, repr=False)
class Netlist:
    """A circuit as it was read or generated; nothing in it changes."""

    nodes: tuple[str, ...]
    """Names by index; the first is ground, "0"."""
    resistors: Branches
    capacitors: Branches
    inductors: Branches
    currents: Branches
    voltages: Branches
    controls: tuple[tuple[str, ...], ...] = ()
    """The words of the cards .op, .tran, .print and the like."""
    files: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Netlist {len(self.nodes)} nodes, {len(self.resistors)} R, {len(self.capacitors)} C, "
            f"{len(self.inductors)} L, {len(self.currents)} I, {len(self.voltages)} V>"
        )

    def error(self, message: str, branches: Branches, index: int) -> SpiceError:
        """An error that blames an element: with the file and line that it was read from."""
        place = int(branches.places[index])
        file = self.files[place >> PLACE_BITS] if self.files else "netlist"
        line = place & (1 << PLACE_BITS) - 1
        return SpiceError(f"{branches.names[index]}: {message}", file, line)

    @property
    def tran(self) -> tuple[float, float] | None:
        """Step and end in seconds that a .tran card asks for."""
        from quernstone.spice.values import number

        for words in self.controls:
            if words[0] == ".tran":
                return number(words[1]), number(words[2])
        return None
