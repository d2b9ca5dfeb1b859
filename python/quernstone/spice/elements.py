"""The semantics: what cards mean, in a table of letters and one of dot words.

A vertical that knows more elements makes a `Reader` with more entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from quernstone.spice.error import SpiceError
from quernstone.spice.grammar import Source
from quernstone.spice.netlist import Branches, Netlist
from quernstone.spice.values import number
from quernstone.spice.waves import Corners, Pulse, Wave

CONTROLS = frozenset({".op", ".tran", ".print", ".plot", ".save", ".probe", ".option", ".options"})
_KINDS = {"r": "resistance", "c": "capacitance", "l": "inductance", "i": "current", "v": "voltage"}


class _Columns:
    """Branches in the making."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.plus: list[int] = []
        self.minus: list[int] = []
        self.values: list[float] = []
        self.places: list[int] = []
        self.waves: dict[int, Wave] = {}

    def branches(self) -> Branches:
        return Branches(
            tuple(self.names),
            np.array(self.plus, np.int32),
            np.array(self.minus, np.int32),
            np.array(self.values, np.float64),
            np.array(self.places, np.int64),
            self.waves,
        )


class Reader:
    """Takes cards and makes a netlist of them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nodes: dict[str, int] = {"0": 0}
        self.columns = {kind: _Columns() for kind in _KINDS}
        self.controls: list[tuple[str, ...]] = []
        self.dots: dict[str, Callable[[list[str], int], None]] = dict.fromkeys(
            CONTROLS, self._control
        )
        self.letters: dict[str, Callable[[list[str], int], None]] = dict.fromkeys(
            _KINDS, self._two_terminals
        )

    def read(self, cards: Iterable[tuple[list[str], int]]) -> None:
        """Takes all cards."""
        letters, dots = self.letters, self.dots
        for words, place in cards:
            first = words[0]
            take = dots.get(first) if first[0] == "." else letters.get(first[0])
            if take is None:
                known = ", ".join([*sorted(map(str.upper, letters)), *sorted([*dots, ".end"])])
                raise self.error(f"got an unknown card {first!r}, expected one of {known}", place)
            take(words, place)

    def netlist(self) -> Netlist:
        """What has been read."""
        made = {kind: columns.branches() for kind, columns in self.columns.items()}
        return Netlist(
            tuple(self.nodes),
            made["r"],
            made["c"],
            made["l"],
            made["i"],
            made["v"],
            tuple(self.controls),
            tuple(self.source.files),
        )

    def error(self, message: str, place: int) -> SpiceError:
        return self.source.error(message, place)

    def node(self, name: str) -> int:
        """The index of a node, which exists from now on."""
        index = self.nodes.get(name)
        if index is None:
            if name == "gnd":
                return 0
            index = self.nodes[name] = len(self.nodes)
        return index

    def number(self, what: str, text: str, place: int) -> float:
        try:
            return number(text)
        except ValueError as error:
            raise self.error(f"{what}: {error}", place) from None

    def _control(self, words: list[str], place: int) -> None:
        if words[0] == ".tran":
            if len(words) < 3:
                raise self.error(f".tran: got {len(words) - 1} words, expected step and end", place)
            step, end = (self.number(".tran", word, place) for word in words[1:3])
            if not 0.0 < step <= end:
                raise self.error(
                    f".tran: got step {step:g} and end {end:g}, expected 0 < step <= end", place
                )
        self.controls.append(tuple(words))

    def _two_terminals(self, words: list[str], place: int) -> None:
        name = words[0]
        kind = name[0]
        if len(words) < 4:
            raise self.error(
                f"{name}: got {len(words) - 1} words, expected two nodes and a {_KINDS[kind]}; "
                "is the file truncated?",
                place,
            )
        columns = self.columns[kind]
        if name in columns.names:
            raise self.error(f"{name}: got a second element of that name", place)
        if len(words) == 4:
            value = self.number(name, words[3], place)
        elif kind in "iv":
            value, wave = self._source(words, place)
            if wave is not None:
                columns.waves[len(columns.names)] = wave
        else:
            extra = " ".join(words[4:])
            raise self.error(f"{name}: got {extra!r} after the value, expected nothing", place)
        if kind in "rcl" and value <= 0.0 and (kind != "r" or value < 0.0):
            least = "0 or more" if kind == "r" else "more than 0"
            raise self.error(f"{name}: got a {_KINDS[kind]} of {value:g}, expected {least}", place)
        columns.names[name] = place
        columns.plus.append(self.node(words[1]))
        columns.minus.append(self.node(words[2]))
        columns.values.append(value)
        columns.places.append(place)

    def _source(self, words: list[str], place: int) -> tuple[float, Wave | None]:
        """The value at direct current and the wave of `[[DC] value] [PULSE ... | PWL ...]`."""
        name, rest = words[0], words[3:]
        value: float | None = None
        if rest[0] == "dc":
            rest = rest[1:]
        if rest and rest[0] not in ("pulse", "pwl"):
            value, rest = self.number(name, rest[0], place), rest[1:]
        if not rest:
            if value is None:
                raise self.error(f"{name}: got no value after dc", place)
            return value, None
        if rest[0] not in ("pulse", "pwl"):
            raise self.error(f"{name}: got {rest[0]!r}, expected DC, PULSE or PWL", place)
        numbers = [self.number(name, word, place) for word in rest[1:]]
        try:
            wave = _wave(rest[0], numbers)
        except ValueError as error:
            raise self.error(f"{name}: {rest[0]}: {error}", place) from None
        return float(wave.at(np.zeros(()))) if value is None else value, wave


def _wave(word: str, numbers: list[float]) -> Wave:
    if word == "pulse":
        if not 6 <= len(numbers) <= 7:
            raise ValueError(f"got {len(numbers)} numbers, expected 6 or 7")
        return Pulse(*numbers)
    if len(numbers) % 2 or not numbers:
        raise ValueError(f"got {len(numbers)} numbers, expected pairs of time and value")
    return Corners(tuple(numbers[::2]), tuple(numbers[1::2]))
