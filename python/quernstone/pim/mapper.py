"""Which group of macros holds which part of a network.

Axes: n tasks, each one macro's worth of weights; g groups.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone import _core
from quernstone.pim.chip import VfTable

Objective = Literal["energy", "latency"]
"""`energy`: sum over tasks of weight times the square of its group's voltage. `latency`: the end of
the last task, and a thousandth of the mean end."""


class Mapped(NamedTuple):
    group: NDArray[np.int64]
    """[n]"""
    cost: float
    """V^2 times the weights' unit, or the weights' unit over Hz."""


_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Problem = tuple[_Ints, _Ints, _Ints, _Floats, _Floats, _Floats, int, int, str]


def map_tasks(
    rates: ArrayLike,
    table: VfTable,
    *,
    groups: int,
    places: int,
    sets: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pinned: ArrayLike | None = None,
    objective: Objective = "energy",
    moves: int = 200_000,
    seed: int = 0,
) -> Mapped:
    """Gathers tasks of like Hamming rates in groups, by simulated annealing.

    The macros of a group share voltage and clock, so its level is that of its greatest rate; the
    groups that hold parts of one set (an operator) have one clock, the slowest of theirs.

    Args:
        rates: [n] Hamming rates, 0 to 1; NaN where they are not known beforehand.
        table: of the levels.
        groups, places: how many groups of how many macros.
        sets: [n] int, which operator a task is part of; None: each its own.
        weights: [n] how much a task counts, 0 or more: its charge for energy, its cycles for
            latency. None: 1.
        pinned: [n] int, the group that a task has to be in, or -1; None: any.
        objective: what is made small.
        moves: exchanges that are tried.
        seed: of the exchanges; equal seeds give equal mappings.

    Returns:
        A `Mapped`, no worse than tasks sorted by rate.

    Raises:
        ValueError: more tasks than macros, more tasks pinned to a group than it has macros, a
            number out of its range.
        TypeError: sets or groups that are no integers.

    Source: AIM, arXiv 2511.04321, HR-aware mapping (our reading). Oracles: `map_exact`, brute
    force, and for energy an integer programme.
    """
    if isinstance(moves, bool) or not isinstance(moves, int):
        raise TypeError(f"moves: got {moves!r}, expected an int")
    if not 0 <= moves < 1 << 40:
        raise ValueError(f"moves: got {moves}, expected 0 or more and below 2^40")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {seed!r}, expected an int")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: got {seed}, expected 0 or more and below 2^64")
    problem = _problem(rates, table, groups, places, sets, weights, pinned, objective)
    return Mapped(*_core.pim.map_tasks(*problem, moves, seed))


def map_exact(
    rates: ArrayLike,
    table: VfTable,
    *,
    groups: int,
    places: int,
    sets: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pinned: ArrayLike | None = None,
    objective: Objective = "energy",
) -> Mapped:
    """The mapping of least cost, by branch and bound; arguments as `map_tasks` takes them.

    Raises:
        ValueError: also where more than 2^22 partial mappings would have to be tried, as happens
            from some 16 tasks on.
    """
    problem = _problem(rates, table, groups, places, sets, weights, pinned, objective)
    return Mapped(*_core.pim.map_tasks(*problem, -1, 0))


def mapping_cost(
    group: ArrayLike,
    rates: ArrayLike,
    table: VfTable,
    *,
    groups: int,
    places: int,
    sets: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pinned: ArrayLike | None = None,
    objective: Objective = "energy",
) -> float:
    """What a mapping costs; arguments as `map_tasks` takes them.

    Raises:
        ValueError: also where the mapping overfills a group or moves a pinned task.
    """
    problem = _problem(rates, table, groups, places, sets, weights, pinned, objective)
    return _core.pim.mapping_cost(*problem, _integers("group", group, len(problem[0])))


def _problem(
    rates: ArrayLike,
    table: VfTable,
    groups: int,
    places: int,
    sets: ArrayLike | None,
    weights: ArrayLike | None,
    pinned: ArrayLike | None,
    objective: str,
) -> _Problem:
    if objective not in get_args(Objective):
        raise ValueError(f"objective: got {objective!r}, expected one of {get_args(Objective)}")
    for name, value in (("groups", groups), ("places", places)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an int")
        if not 0 < value <= 4096:
            raise ValueError(f"{name}: got {value}, expected 1 to 4096")
    if np.ndim(np.asarray(rates)) != 1:
        raise ValueError(f"rates.ndim: got {np.ndim(np.asarray(rates))}, expected 1")
    level = table.safe_level(np.asarray(rates, np.float64))
    count = len(level)
    if np.asarray(rates).size == 0:
        raise ValueError("rates: got none, expected one task at least")
    named = np.arange(count) if sets is None else _integers("sets", sets, count)
    # Any numbers name operators; the core counts them from 0.
    numbered = np.unique(named, return_inverse=True)[1].astype(np.int64)
    places_of = np.full(count, -1) if pinned is None else _integers("pinned", pinned, count)
    counted = np.ones(count) if weights is None else np.array(weights, np.float64)
    if counted.shape != (count,):
        raise ValueError(f"weights.shape: got {counted.shape}, expected {(count,)}")
    return (
        level,
        numbered,
        places_of.astype(np.int64),
        counted,
        np.asarray(table.volts),
        np.asarray(table.hertz),
        groups,
        places,
        objective,
    )


def _integers(name: str, x: ArrayLike, count: int) -> NDArray[np.int64]:
    found = np.asarray(x)
    if found.shape != (count,):
        raise ValueError(f"{name}.shape: got {found.shape}, expected {(count,)}")
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"{name}: got dtype {found.dtype}, expected an integer one")
    return np.array(found, np.int64)
