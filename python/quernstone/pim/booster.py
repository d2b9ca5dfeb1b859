"""IR-Booster: groups of macros that take the voltage and clock that their supply's drop allows.

Axes: t cycles of work, m macros, g groups, l levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone import _core
from quernstone.machine import Machine
from quernstone.pim.chip import VfTable
from quernstone.plan import Interval, Plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_CHANGES = 1 << 16


@dataclass(frozen=True)
class Control:
    """How a group moves between levels. All are assumed; see the sweep of sensitivities.

    Args:
        patience: cycles without a failure after which a group tries one level more (the paper's
            beta).
        relapse: a failure within so many cycles of taking up a level sets the aim back by one.
        recompute: cycles of work that a failure loses.
        stall: cycles that the group stands still after one, below 2^16: each is simulated.
        backoff: what such a relapse multiplies the patience by before the next level is tried, 1 or
            more. 1 is the paper's rule as we read it: a group then spends its energy on trying
            again.
    """

    patience: int = 50
    relapse: int = 200
    recompute: int = 8
    stall: int = 4
    backoff: int = 2

    def __post_init__(self) -> None:
        for name in ("patience", "relapse", "recompute", "stall", "backoff"):
            value, least = getattr(self, name), int(name == "backoff")
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an int")
            bits = 16 if name == "stall" else 31
            if not least <= value < 1 << bits:
                raise ValueError(
                    f"{name}: got {value}, expected {least} or more and below 2^{bits}"
                )

    @classmethod
    def of_chip(cls, chip: Machine) -> Control:
        """What the figures `booster.patience` and so on of a chip say, rounded."""
        names = ("patience", "relapse", "recompute", "stall", "backoff")
        return cls(**{name: round(chip.value(f"booster.{name}", "1")) for name in names})


class Change(NamedTuple):
    """What a monitor saw, and the level of its group from then on."""

    seconds: float
    group: int
    level: int
    event: Literal["level", "failure", "done"]


@dataclass(frozen=True, eq=False)
class Boosted:
    """What a chip took for a trace of work; simulated."""

    table: VfTable
    seconds: Floats
    """[g] when a group was done."""
    joules: Floats
    """[g]"""
    cycles: Ints
    """[g] clock cycles, with those that were lost and those that it stood still."""
    failures: Ints
    """[g]"""
    beyond: Ints
    """[g] failures at the level that its own Hamming rate calls safe, or above it: what the
    neighbours draw is not in it."""
    at_level: Ints
    """[g, l] cycles at each level."""
    worst: Floats
    """[m] V, the greatest drop of a macro's supply."""
    first: Ints
    """[g] levels at the beginning."""
    changes: tuple[Change, ...] = field(repr=False)
    """In the order of simulation; the first 65,536 of them."""
    number_of_changes: int = 0

    @property
    def time(self) -> float:
        """s until the last group is done."""
        return float(self.seconds.max(initial=0.0))

    @property
    def energy(self) -> float:
        """J of all groups."""
        return float(self.joules.sum())

    @property
    def worst_drop(self) -> float:
        """V"""
        return float(self.worst.max(initial=0.0))

    def plan(self, title: str = "levels of the groups, simulated") -> Plan:
        """The levels of each group over time."""
        names = [f"group {g}" for g in range(len(self.seconds))]
        level, since = self.first.tolist(), [0.0] * len(names)
        intervals = []
        for change in self.changes:
            g = change.group
            if change.seconds > since[g]:
                rate = self.table.levels[level[g]]
                intervals.append(
                    Interval(names[g], since[g], change.seconds, f"{rate:.0%}", f"level {rate:.0%}")
                )
            level[g], since[g] = change.level, change.seconds
        return Plan(tuple(names), tuple(intervals), title=title)


def boost(
    dynamic: ArrayLike,
    table: VfTable,
    groups: ArrayLike,
    hamming: ArrayLike,
    response: ArrayLike,
    *,
    leak: ArrayLike = 0.0,
    domains: ArrayLike | None = None,
    control: Control | None = None,
    level: int | None = None,
) -> Boosted:
    """Runs a trace of currents through a chip whose groups adapt to their supply's drop.

    A group works at a level's voltage and clock. In every cycle each macro's drop is the response
    to what all macros draw at that moment; where it leaves less than the clock needs, the cycle has
    failed: the group goes to the level that its greatest Hamming rate calls safe (or, from there,
    one further), stands still, and does the lost work again. After `patience` good cycles it
    returns to the level it aims at, or aims one level further. Groups of a domain share the
    slowest's clock. Dynamic current goes with voltage and clock, leakage with voltage.

    Args:
        dynamic: [t, m] A, what switching draws at the nominal voltage and clock.
        table: of the levels.
        groups: [m] int, which group a macro belongs to, numbered from 0 without gaps.
        hamming: [m] Hamming rates of the macros' weights; NaN where they are not known beforehand.
        response: [m, m] V at one macro for each A at another.
        leak: [m] A at the nominal voltage, or one for all.
        domains: [g] int, groups that share a clock bear one number; None: each by itself.
        control: how groups move. None: the defaults.
        level: where all groups stay, without a monitor; what fails there still does its work again.
            None: they begin at their safe levels and move.

    Returns:
        A `Boosted`. Equal arguments give equal results.

    Raises:
        ValueError: lengths that disagree, a number out of its range, a group whose supply does not
            carry it at the last level.
        TypeError: groups or domains that are no integers.

    Source: AIM, arXiv 2511.04321, IR-Booster (our reading: the body of the paper was not at hand).
    Oracle: `quernstone.pim.reference_chip.boost`; without failures, the table's power.
    """
    control = Control() if control is None else control
    currents = _floats("dynamic", dynamic, 2)
    macros = currents.shape[1]
    group = _integers("groups", groups)
    count = int(group.max(initial=-1)) + 1
    if len(group) != macros:
        raise ValueError(f"groups.shape[0]: got {len(group)}, expected {macros} (macros)")
    if macros == 0 or set(group.tolist()) != set(range(count)):
        raise ValueError("groups: got numbers with gaps, expected 0, 1, ... each of some macro")
    rates = _floats("hamming", hamming, 1)
    if rates.shape != (macros,):
        raise ValueError(f"hamming.shape: got {rates.shape}, expected {(macros,)}")
    # One macro of unknown weights makes its group's unknown.
    safe = np.zeros(count, np.int64)
    np.maximum.at(safe, group, table.safe_level(rates))
    domain = np.arange(count) if domains is None else _integers("domains", domains)
    if len(domain) != count:
        raise ValueError(f"domains.shape[0]: got {len(domain)}, expected {count} (groups)")
    if level is None:
        first = safe
    else:
        if isinstance(level, bool) or not isinstance(level, int):
            raise TypeError(f"level: got {level!r}, expected an int or None")
        if not 0 <= level < len(table.levels):
            raise ValueError(f"level: got {level}, expected 0 to {len(table.levels) - 1}")
        first = np.full(count, level, np.int64)
    leaks = np.asarray(leak, np.float64)
    if leaks.ndim not in (0, 1) or (leaks.ndim == 1 and len(leaks) != macros):
        raise ValueError(f"leak.shape: got {leaks.shape}, expected {(macros,)} or one for all")
    found = _core.pim.boost(
        currents,
        np.array(np.broadcast_to(leaks, macros)),
        _floats("response", response, 2),
        group,
        domain.astype(np.int64),
        safe,
        first,
        np.asarray(table.volts),
        np.asarray(table.hertz),
        np.asarray(table.need),
        level is None,
        (
            control.patience,
            control.relapse,
            control.recompute,
            control.stall,
            control.backoff,
        ),
        (table.nominal_volts, table.nominal_hertz),
        MOST_CHANGES,
    )
    events = tuple(Change(*event) for event in found[-2])
    return Boosted(table, *found[:7], first, events, found[-1])


def _floats(name: str, x: ArrayLike, ndim: int) -> Floats:
    try:
        found = np.asarray(x, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(x).__name__}, expected numbers") from None
    if found.ndim != ndim:
        raise ValueError(f"{name}.ndim: got {found.ndim}, expected {ndim}")
    return found


def _integers(name: str, x: ArrayLike) -> Ints:
    found = np.asarray(x)
    if found.ndim != 1:
        raise ValueError(f"{name}.ndim: got {found.ndim}, expected 1")
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"{name}: got dtype {found.dtype}, expected an integer one")
    return np.array(found, np.int64)
