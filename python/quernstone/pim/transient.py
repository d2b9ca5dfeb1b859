"""Grids over time: resistors, capacitors and inductors under currents that change.

With a fixed step h every capacitor and inductor is a conductance beside a source of current that
the last step sets, so that one factorisation serves all steps:

                 conductance   source
    Euler        C / h         C/h v                  i_C = C/h (v' - v)
                 h / L         i                      i_L' = i + h/L v'
    trapezoidal  2C / h        2C/h v + i             i_C' = 2C/h (v' - v) - i
                 h / 2L        i + h/2L v             i_L' = i + h/2L (v + v')

Axes: n nodes, t times, s sources, o observed nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernstone._checks import number
from quernstone.pim.grid import Factor, Floats, Grid, factor
from quernstone.pim.grid_netlist import Shorts, grid_of, held_nodes, merged, numbered, places_of
from quernstone.spice import Branches, Netlist

Method = Literal["trapezoidal", "euler"]


@dataclass(frozen=True, eq=False)
class Course:
    """Voltages over time."""

    times: Floats
    """[t] seconds, from 0 on"""
    names: tuple[str, ...]
    """[o]"""
    volts: Floats
    """[t, o]"""

    def of(self, name: str) -> Floats:
        """[t] of one node."""
        return self.volts[:, self.names.index(name)]


def transient(
    netlist: Netlist,
    step: float,
    end: float,
    *,
    method: Method = "trapezoidal",
    observe: Sequence[str] | None = None,
    shorts: Shorts = "refuse",
) -> Course:
    """The voltages of a netlist from its operating point on.

    Args:
        netlist: of R, L, C and sources; those with a wave follow it.
        step: seconds.
        end: seconds; the last time is the multiple of `step` that is nearest to it.
        method: "trapezoidal" is exact to the second order in the step, "euler" (backward) to the
            first and damps what is faster than the step.
        observe: names of nodes; None: all.
        shorts: see `grid_of`.

    Returns:
        The course; its first row is the operating point at the values that sources have at 0.

    Raises:
        ValueError: a step that is not positive or beyond the end, an unknown method or node.
        SpiceError: as `grid_of`; inductors in a ring, in which any current may flow.

    Source: companion models, e.g. Pillage, Rohrer and Visweswariah, "Electronic Circuit and System
    Simulation Methods", 1995. The oracles are ngspice and matrix exponentials.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}, expected one of {get_args(Method)}")
    if not 0.0 < number("step", step) <= number("end", end):
        raise ValueError(f"step: got {step} of {end} s, expected more than 0 and at most the end")
    static = grid_of(netlist, shorts=shorts)
    root = merged(netlist, shorts, inductors=False)
    held = held_nodes(netlist, root)
    order, index = numbered(netlist, root, held)
    names = tuple(netlist.nodes) if observe is None else tuple(observe)
    at = {name: int(i) for name, i in zip(netlist.nodes, index, strict=True)}
    missing = [name for name in names if name not in at]
    if missing:
        raise ValueError(f"observe: got {missing[0]!r}, expected the name of a node")
    seen = np.array([at[name] for name in names], np.int64)

    twice = 2.0 if method == "trapezoidal" else 1.0
    c = _Ends.of(netlist.capacitors, index, twice * netlist.capacitors.values / step)
    coil = _Ends.of(netlist.inductors, index, step / (twice * netlist.inductors.values))
    resistors = netlist.resistors
    ohm = np.where(resistors.values > 0.0, resistors.values, 1.0)
    r = _Ends.of(resistors, index, 1.0 / ohm)
    ends = (r.joining(), c.joining(), coil.joining())
    grid = Grid(
        len(order),
        np.concatenate([e.plus for e in ends]),
        np.concatenate([e.minus for e in ends]),
        np.concatenate([e.conductance for e in ends]),
        np.array([held[node] for node in order if node in held]),
        names=tuple(netlist.nodes[node] for node in order),
        places=places_of(netlist, order, len(held)),
    )
    solver = factor(grid)

    count = round(end / step)
    times: Floats = step * np.arange(count + 1, dtype=np.float64)
    loads = _Sources(netlist.currents, index, times)
    rails = _Sources(netlist.voltages, index, times)
    moving = _Held(grid, rails) if netlist.voltages.waves else None

    idle = factor(static)
    start = idle.solve()[[static.node(netlist.nodes[node]) for node in order]]
    through = _inductor_currents(netlist, index, start, r, loads.at(0, grid.nodes), grid.free)
    into = np.zeros(len(c.plus))
    volts = start
    out = np.empty((count + 1, len(seen)))
    out[0] = volts[seen]
    for t in range(1, count + 1):
        drawn = loads.at(t, grid.nodes)
        across_c, across_l = c.across(volts), coil.across(volts)
        kept = c.conductance * across_c
        if method == "trapezoidal":
            kept = kept + into
            through = through + coil.conductance * across_l
        c.add(drawn, -kept)
        coil.add(drawn, through)
        volts = solver.solve(drawn) if moving is None else moving.solve(solver, drawn, t)
        into = c.conductance * c.across(volts) - kept
        through = through + coil.conductance * coil.across(volts)
        out[t] = volts[seen]
    return Course(times, names, out)


@dataclass(frozen=True)
class _Ends:
    """Branches by the indices of the grid."""

    plus: NDArray[np.int32]
    minus: NDArray[np.int32]
    conductance: Floats

    @classmethod
    def of(cls, branches: Branches, index: NDArray[np.int32], conductance: Floats) -> _Ends:
        plus, minus = index[branches.plus], index[branches.minus]
        kept = plus != minus
        # A branch whose ends are one node keeps its place and carries nothing.
        return cls(plus, minus, np.where(kept, conductance, 0.0))

    def joining(self) -> _Ends:
        kept = self.plus != self.minus
        return _Ends(self.plus[kept], self.minus[kept], self.conductance[kept])

    def across(self, volts: Floats) -> Floats:
        return np.asarray(volts[self.plus] - volts[self.minus])

    def add(self, drawn: Floats, currents: Floats) -> None:
        """Adds currents from plus to minus to what the nodes draw."""
        np.add.at(drawn, self.plus, currents)
        np.subtract.at(drawn, self.minus, currents)


class _Sources:
    """Sources of current at every time."""

    def __init__(self, branches: Branches, index: NDArray[np.int32], times: Floats) -> None:
        self.plus, self.minus = index[branches.plus], index[branches.minus]
        self.still = np.array(branches.values)
        self.waves = [(i, wave.at(times)) for i, wave in branches.waves.items()]

    def values(self, t: int) -> Floats:
        values = self.still
        for i, course in self.waves:
            values[i] = course[t]
        return values

    def at(self, t: int, nodes: int) -> Floats:
        """[n] ampere that the nodes draw."""
        drawn = np.zeros(nodes)
        values = self.values(t)
        np.add.at(drawn, self.plus, values)
        np.subtract.at(drawn, self.minus, values)
        return drawn


class _Held:
    """Held nodes whose voltages follow a wave."""

    def __init__(self, grid: Grid, rails: _Sources) -> None:
        self.grid, self.rails = grid, rails
        ground = grid.names.index("0")
        # A source whose ends were made one node holds nothing.
        self.holding = np.flatnonzero(rails.plus != rails.minus)
        plus, minus = rails.plus[self.holding], rails.minus[self.holding]
        self.sign = np.where(minus == ground, 1.0, -1.0)
        self.node = np.where(minus == ground, plus, minus)

    def solve(self, solver: Factor, drawn: Floats, t: int) -> Floats:
        grid = self.grid
        volts = np.array(grid.volts)
        volts[self.node - grid.free] = self.sign * self.rails.values(t)[self.holding]
        change = np.zeros(grid.nodes)
        change[grid.free :] = volts - grid.volts
        # A held node that rises draws less through each of its branches.
        for foot, top in ((grid.a, grid.b), (grid.b, grid.a)):
            np.subtract.at(drawn, foot, grid.conductance * change[top])
        found = solver.solve(drawn)
        found[grid.free :] = volts
        return found


def _inductor_currents(
    netlist: Netlist,
    index: NDArray[np.int32],
    volts: Floats,
    resistors: _Ends,
    drawn: Floats,
    free: int,
) -> Floats:
    """What flows through inductors at direct current: all that the rest of a node draws.

    Inductors that join free nodes are a forest, and are taken from its leaves on.
    """
    inductors = netlist.inductors
    plus, minus = index[inductors.plus], index[inductors.minus]
    owed = np.array(drawn)
    resistors.add(owed, resistors.conductance * resistors.across(volts))
    through = np.zeros(len(inductors))
    of_node: dict[int, set[int]] = {}
    for i, ends in enumerate(zip(plus.tolist(), minus.tolist(), strict=True)):
        for node in ends:
            if ends[0] != ends[1]:
                of_node.setdefault(node, set()).add(i)
    leaves = [node for node, own in of_node.items() if node < free and len(own) == 1]
    left = sum(len(own) for own in of_node.values()) // 2
    while leaves:
        node = leaves.pop()
        if len(of_node[node]) != 1:
            continue
        i = of_node[node].pop()
        other = int(minus[i] if plus[i] == node else plus[i])
        through[i] = -owed[node] if plus[i] == node else owed[node]
        owed[other] += owed[node]
        of_node[other].discard(i)
        left -= 1
        if other < free and len(of_node[other]) == 1:
            leaves.append(other)
    if left:
        ring = next(i for own in of_node.values() for i in own)
        raise netlist.error(
            "got an inductor in a ring of inductors and sources, expected none: any current may "
            "flow in it",
            inductors,
            ring,
        )
    return through
