"""Chips of SRAM macros as sets of figures, and the voltages and clocks that they may run at.

Nothing here is silicon: a chip is a model whose figures say where they come from, most of them
assumed. Any of them can be replaced, and what follows computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernstone._checks import number
from quernstone.machine import Figure, Machine, Source

Mode = Literal["low-power", "sprint"]
"""What a smaller drop is used for: a lower voltage at one clock, a higher clock at one voltage."""

LEVELS = (0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 1.00)
"""Toggle rates that margins are made for; the last is that of sign-off, when every cell toggles.
Assumed: as we recall the paper, which was not at hand."""

_RECALLED = "as we recall the paper's set-up, not confirmed"


def _figure(value: float, unit: str, source: Source, note: str) -> Figure:
    return Figure(value, unit, source, f"model, not silicon: {note}")


CHIPS: Mapping[str, Machine] = {
    "aim-7nm-256tops": Machine(
        "aim-7nm-256tops",
        {
            "chip.rate": _figure(256.0, "TOP/s", "published", "7 nm, AIM, arXiv 2511.04321"),
            "chip.macros": _figure(64, "1", "assumed", _RECALLED),
            "chip.groups": _figure(16, "1", "assumed", _RECALLED),
            "macro.rows": _figure(256, "1", "assumed", "gives the chip's rate with 64 banks"),
            "macro.banks": _figure(64, "1", "assumed", "gives the chip's rate with 256 rows"),
            "macro.weight_bits": _figure(8, "1", "assumed", "int8 networks"),
            "macro.input_bits": _figure(8, "1", "assumed", "int8 networks, bit-serial"),
            "macro.power": _figure(0.25, "W", "assumed", "with every cell toggling; 16 W a chip"),
            "macro.static_share": _figure(
                0.1, "1", "assumed", "of that, what does not depend on toggles: leakage, clock"
            ),
            "supply.voltage": _figure(0.75, "V", "assumed", _RECALLED),
            "supply.clock": _figure(1.0, "GHz", "assumed", _RECALLED),
            "signoff.drop": _figure(140.0, "mV", "assumed", _RECALLED),
            "device.threshold": _figure(0.25, "V", "assumed", "alpha-power law"),
            "device.exponent": _figure(1.3, "1", "assumed", "alpha-power law, short channels"),
            "booster.patience": _figure(50, "1", "assumed", "good cycles before a lower level"),
            "booster.relapse": _figure(200, "1", "assumed", "cycles: so soon a failure counts"),
            "booster.recompute": _figure(8, "1", "assumed", "cycles lost: one vector of 8 bits"),
            "booster.stall": _figure(4, "1", "assumed", "cycles to settle the supply"),
            "booster.backoff": _figure(2, "1", "assumed", "growth of patience after a relapse"),
        },
    )
}
"""Chips by name. The rate, the node and the three headline figures that they are held against are
published; all else is assumed, and said to be."""


def signoff_toggle_current(chip: Machine) -> float:
    """A that a macro draws when every cell toggles, at the nominal voltage and clock."""
    return chip.value("macro.power", "W") / chip.value("supply.voltage", "V")


@dataclass(frozen=True)
class VfTable:
    """Voltage and clock by level of toggle rate, from the most aggressive level on.

    Axes: l levels.

    Args:
        mode: see `Mode`.
        levels: [l] rising, above 0 and up to 1: a level is safe where no cell's supply drops by
            more than it does when all macros toggle at that rate.
        volts: [l] at the pads.
        hertz: [l]
        need: [l] V that a cell needs for that clock.
        nominal_volts, nominal_hertz: of the last level, that of sign-off.

    Raises:
        ValueError: lengths that differ, levels that do not rise, a figure that is not positive.
    """

    mode: Mode
    levels: tuple[float, ...]
    volts: tuple[float, ...]
    hertz: tuple[float, ...]
    need: tuple[float, ...]
    nominal_volts: float
    nominal_hertz: float

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: got {self.mode!r}, expected one of {get_args(Mode)}")
        check_levels(self.levels)
        for name in ("volts", "hertz", "need"):
            column = getattr(self, name)
            if len(column) != len(self.levels):
                raise ValueError(f"{name}: got {len(column)}, expected {len(self.levels)}")
            for i, value in enumerate(column):
                if not number(f"{name}[{i}]", value) > 0.0:
                    raise ValueError(f"{name}[{i}]: got {value}, expected a positive number")
        for name in ("nominal_volts", "nominal_hertz"):
            if not number(name, getattr(self, name)) > 0.0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")

    @classmethod
    def of_chip(
        cls, chip: Machine, mode: Mode = "low-power", levels: Sequence[float] = LEVELS
    ) -> VfTable:
        """The table that a chip's figures give.

        A cell's clock follows the alpha-power law, f ~ (V - Vt)^a / V, and the nominal clock is
        what it reaches when the drop is that of sign-off. When all macros toggle at rate L, the
        drop is D(L) = D (s + (1 - s) L f / f0) V / V0, with s the share of the current that does
        not depend on toggles. In low power V - D(L) is what the nominal clock needs; in sprint f
        is what V0 - D(L) allows.

        Args:
            chip: with the figures of those in `CHIPS`.
            mode: see `Mode`.
            levels: see `VfTable`.

        Raises:
            ValueError: a figure is missing or contradicts another: a share above 1, a drop that
                leaves a cell with its threshold or less.

        Source: AIM, arXiv 2511.04321, IR-Booster (our reading); Sakurai and Newton, "Alpha-power
        law MOSFET model", 1990.
        """
        check_levels(levels)
        volts, hertz = chip.value("supply.voltage", "V"), chip.value("supply.clock", "Hz")
        drop = chip.value("signoff.drop", "V")
        static = chip.value("macro.static_share", "1")
        threshold, exponent = (
            chip.value("device.threshold", "V"),
            chip.value("device.exponent", "1"),
        )
        if static > 1.0:
            raise ValueError(f"macro.static_share: got {static}, expected at most 1")
        need = volts - drop
        if need <= threshold:
            raise ValueError(
                f"signoff.drop: got {drop} V of {volts} V, expected what leaves more than the "
                f"threshold of {threshold} V"
            )

        def speed(v: float) -> float:
            return math.pow(v - threshold, exponent) / v

        rows: list[tuple[float, float, float]] = []
        for level in levels:
            if mode == "low-power":
                share = drop * (static + (1.0 - static) * level) / volts
                rows.append((need / (1.0 - share), hertz, need))
                continue
            # The clock raises the drop, and the drop lowers the clock: bisection of what is left.
            low, high = need, volts
            for _ in range(100):
                middle = (low + high) / 2
                clock = speed(middle) / speed(need)
                fits = volts - middle >= drop * (static + (1.0 - static) * level * clock)
                low, high = (middle, high) if fits else (low, middle)
            rows.append((volts, hertz * speed(low) / speed(need), low))
        at, clocks, needs = zip(*rows, strict=True)
        return cls(mode, tuple(levels), at, clocks, needs, volts, hertz)

    def safe_level(self, rates: float | Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
        """The first level at or above each rate: with Hamming rates, the one no input can exceed.

        Args:
            rates: 0 to 1. NaN stands for weights that are not known beforehand: the last level.

        Raises:
            ValueError: a rate outside 0 to 1, or above the last level.
        """
        x = np.atleast_1d(np.asarray(rates, np.float64))
        x = np.where(np.isnan(x), self.levels[-1], x)
        bad = np.flatnonzero((x < 0.0) | (x > self.levels[-1]))
        for i in bad[:1]:
            raise ValueError(f"rates[{i}]: got {x[i]}, expected 0 to {self.levels[-1]}")
        return np.searchsorted(np.asarray(self.levels), x, side="left").astype(np.int64)


def check_levels(levels: Sequence[float]) -> None:
    if not levels:
        raise ValueError("levels: got none, expected one at least")
    previous = 0.0
    for i, level in enumerate(levels):
        if not previous < number(f"levels[{i}]", level) <= 1.0:
            raise ValueError(f"levels[{i}]: got {level}, expected rising rates above 0 and up to 1")
        previous = level


def with_figure(chip: Machine, name: str, factor: float) -> Machine:
    """The chip with one figure multiplied, as a sweep of sensitivities takes it.

    Raises:
        ValueError: there is no such figure, or the product is not positive.
    """
    if not number("factor", factor) > 0.0 or not math.isfinite(factor):
        raise ValueError(f"factor: got {factor}, expected a positive number")
    figure = chip.figure(name)
    changed = replace(figure, value=figure.value * factor, source="assumed")
    return Machine(chip.name, {**chip.figures, name: changed})
