"""What a machine can do, in figures each of which says where it comes from."""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, get_args

from quernstone import _document
from quernstone._checks import number, text

Source = Literal["measured", "published", "assumed"]
"""On this machine, by its maker or in a paper, or by nobody."""

_FORMAT, _VERSION = "quernstone.machine", 1
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


def _units() -> dict[str, tuple[tuple[int, ...], Fraction]]:
    """Of every unit the exponents of (s, B, FLOP, OP, V, A) and the factor to their product."""
    bases = {
        "s": ((1, 0, 0, 0, 0, 0), "num"),
        "Hz": ((-1, 0, 0, 0, 0, 0), "kMG"),
        "B": ((0, 1, 0, 0, 0, 0), "kMGT"),
        "FLOP": ((0, 0, 1, 0, 0, 0), "kMGTP"),
        "OP": ((0, 0, 0, 1, 0, 0), "kMGTP"),
        "V": ((0, 0, 0, 0, 1, 0), "um"),
        "A": ((0, 0, 0, 0, 0, 1), "pnum"),
        "W": ((0, 0, 0, 0, 1, 1), "pnumk"),
        "J": ((1, 0, 0, 0, 1, 1), "pnumk"),
        "Ohm": ((0, 0, 0, 0, 1, -1), "mk"),
        "F": ((1, 0, 0, 0, -1, 1), "pnum"),
        "H": ((1, 0, 0, 0, 1, -1), "pnum"),
    }
    powers = {"p": -12, "n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
    units: dict[str, tuple[tuple[int, ...], Fraction]] = {"1": ((0,) * 6, Fraction(1))}
    for base, (exponents, prefixes) in bases.items():
        for prefix in ("", *prefixes):
            units[prefix + base] = exponents, Fraction(10) ** powers[prefix]
    for power, prefix in enumerate("KMGT", start=1):
        units[f"{prefix}iB"] = units["B"][0], Fraction(1024**power)
    amounts = [unit for unit in units if unit.endswith(("B", "OP"))]
    for unit in amounts:
        (seconds, *others), factor = units[unit]
        units[f"{unit}/s"] = (seconds - 1, *others), factor
    return units


_UNITS = _units()
_MOST = sys.float_info.max


@dataclass(frozen=True)
class Figure:
    """A positive number with a unit and where it comes from.

    Raises:
        ValueError: a value that is not finite and positive, an unknown unit or source.
        TypeError: a value of another type.
    """

    value: float
    unit: str
    source: Source
    note: str = ""
    """How it was measured, who published it, or why it is assumed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(number("value", self.value)))
        if not self.value > 0.0:
            raise ValueError(f"value: got {self.value}, expected a positive number")
        _unit("unit", self.unit)
        if self.source not in get_args(Source):
            known = ", ".join(get_args(Source))
            raise ValueError(f"source: got {self.source!r}, expected one of {known}")
        text("note", self.note, empty=True)

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit} ({self.source})"


@dataclass(frozen=True)
class Machine:
    """Figures by dotted names: "cpu.read_bandwidth", "gpu.fp16_rate", "link.bandwidth" ...

    Args:
        name: of the machine.
        figures: by name, lower-case words and digits, two at least, with dots between them.

    Raises:
        ValueError: a name of another form.
        TypeError: a value of another type.
    """

    name: str
    figures: Mapping[str, Figure] = field(hash=False)

    def __post_init__(self) -> None:
        text("name", self.name)
        figures: dict[Any, Any] = dict(self.figures)
        for name, figure in figures.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"figures: got the name {name!r}, expected one like 'cpu.clock'")
            if not isinstance(figure, Figure):
                got = type(figure).__name__
                raise TypeError(f"figures[{name!r}]: got {got}, expected a Figure")
        object.__setattr__(self, "figures", MappingProxyType(figures))

    def __reduce__(self) -> tuple[type["Machine"], tuple[str, dict[str, Figure]]]:
        # The view that keeps the figures from changing cannot be pickled.
        return Machine, (self.name, dict(self.figures))

    def figure(self, name: str) -> Figure:
        """The figure of a name.

        Raises:
            ValueError: there is none; the nearest names are told.
        """
        if name not in self.figures:
            names = get_close_matches(name, self.figures, n=3) or list(self.figures)
            there = ", ".join(names) or "no figure"
            raise ValueError(f"machine {self.name!r}: got no figure {name!r}, there is {there}")
        return self.figures[name]

    def value(self, name: str, unit: str) -> float:
        """The number of a figure in the wanted unit.

        Args:
            name: of the figure.
            unit: what to give it in: s, Hz, B, FLOP, OP, V, A, W, J, Ohm, F, H with the usual
                prefixes ("us", "kB", "MiB"), rates of bytes and operations ("GB/s", "TFLOP/s"), and
                "1".

        Raises:
            ValueError: there is no such figure or unit, or the figure measures something else, or
                it is no positive float64 in that unit.
        """
        figure = self.figure(name)
        kind, factor = _UNITS[_unit("unit", unit)]
        own_kind, own_factor = _UNITS[figure.unit]
        if kind != own_kind:
            raise ValueError(
                f"machine {self.name!r}: {name} is {figure}, expected a figure that {unit} measures"
            )
        exact = Fraction(figure.value) * own_factor / factor
        if exact > _MOST or not float(exact):
            raise ValueError(
                f"machine {self.name!r}: {name} is {figure}, expected what float64 holds in {unit}"
            )
        return float(exact)

    def expect_product(self, name: str, factors: Sequence[str], *, within: float) -> None:
        """Refuses figures that contradict each other: one must be the product of others.

        For example the bytes of a transfer, the link's bandwidth times the transfer's time.

        Args:
            name: of the figure that is the product.
            factors: names of the others.
            within: relative difference from the product that is let pass, 0 or more.

        Raises:
            ValueError: a difference of more than that; a missing figure; units that do not
                multiply; `within` out of its range.
        """
        if number("within", within) < 0.0:
            raise ValueError(f"within: got {within}, expected 0 or more")
        figure, others = self.figure(name), [self.figure(factor) for factor in factors]
        kinds = [_UNITS[other.unit][0] for other in others]
        kind, factor = _UNITS[figure.unit]
        told = " * ".join(f"{at} {other}" for at, other in zip(factors, others, strict=True))
        if tuple(map(sum, zip(*kinds, strict=True))) != kind:
            raise ValueError(f"machine {self.name!r}: {name} is {figure}, no unit of {told or 1}")
        exact = math.prod(Fraction(other.value) * _UNITS[other.unit][1] for other in others)
        product = exact / factor
        # Each figure was rounded once when it became a float.
        rounding = (1 + len(others)) * Fraction(1, 2**53)
        if abs(Fraction(figure.value) - product) > (Fraction(within) + rounding) * product:
            shown = float(min(product, Fraction(_MOST)))
            raise ValueError(
                f"machine {self.name!r}: {name} is {figure}, expected {shown:g} "
                f"{figure.unit} within {100 * within:g} %: {told}"
            )

    def expect_order(self, *names: str) -> None:
        """Refuses figures that contradict each other: none may be larger than the next.

        For example what was measured, and the limit that the maker publishes.

        Raises:
            ValueError: one is larger than the next; a missing figure; units that do not compare.
        """
        for name, following in pairwise(names):
            figure, limit = self.figure(name), self.figure(following)
            if self.value(name, limit.unit) > limit.value:
                raise ValueError(
                    f"machine {self.name!r}: {name} is {figure}, expected at most {following}, "
                    f"{limit}"
                )

    def with_figures(self, figures: Mapping[str, Figure], name: str | None = None) -> "Machine":
        """Another machine: some figures replaced or added, under a new name if one is given."""
        return Machine(self.name if name is None else name, {**self.figures, **figures})

    def table(self) -> str:
        """A line for each figure: name, number, unit, source, note."""
        rows = [
            (name, f"{figure.value:g}", figure.unit, figure.source, " ".join(figure.note.split()))
            for name, figure in self.figures.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}} {row[2]:{widths[2]}}  "
            f"{row[3]:{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        return "\n".join([self.name, *lines])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it; `from_json` gives an equal machine back."""
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        return {"format": _FORMAT, "version": _VERSION, "name": self.name, "figures": figures}

    @classmethod
    def from_json(cls, data: Any) -> "Machine":
        """The machine of `to_json`.

        Raises:
            ValueError: another format or version; a field that is missing, unknown, of another type
                or out of its range. It is named.
        """
        found = _document.body(data, _FORMAT, _VERSION, name=str, figures=dict)
        figures = {}
        for name, item in found["figures"].items():
            where = f"figures[{name!r}]"
            values = _document.fields(item, where, value=float, unit=str, source=str, note=str)
            try:
                figures[name] = Figure(**values)
            except ValueError as error:
                raise ValueError(f"{where}.{error}") from error
        return cls(found["name"], figures)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the machine as JSON; a file of that name stays whole until it is replaced."""
        _document.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Machine":
        """Reads what `save` wrote.

        Raises:
            ValueError: as `from_json`, with the path before the field; no JSON.
            OSError: the file cannot be read.
        """
        return _document.read(path, cls.from_json)


def _unit(where: str, unit: str) -> str:
    if text(where, unit) not in _UNITS:
        near = get_close_matches(unit, _UNITS, n=4, cutoff=0.4) or ["s", "B", "GB/s", "FLOP/s", "1"]
        raise ValueError(f"{where}: got {unit!r}, expected a unit such as {', '.join(near)}")
    return unit
