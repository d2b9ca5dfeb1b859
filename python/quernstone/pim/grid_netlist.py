"""Grids from netlists and netlists from grids."""

from __future__ import annotations

import re
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernstone.pim.grid import Grid
from quernstone.spice import GROUND, Branches, Netlist

Shorts = Literal["refuse", "merge"]
# Less, and sums of conductances are not finite in float64.
_LEAST = 1e-290
_PLACE = re.compile(r".*_(-?\d+)_(-?\d+)")


def grid_of(netlist: Netlist, *, shorts: Shorts = "refuse") -> Grid:
    """The grid of a netlist at direct current, with the currents of its sources.

    Capacitors are open and inductors join their nodes. Voltage sources hold nodes against ground.

    Args:
        netlist: that was read or generated.
        shorts: what becomes of resistors of 0 ohm and sources of 0 volt between two nodes, with
            which benchmarks write vias: "refuse" them, or "merge" the nodes.

    Returns:
        A grid whose free nodes come first, in the order of the netlist, then ground and the other
        held nodes. Merged nodes bear the name of the first; `Grid.node` knows all names.

    Raises:
        SpiceError: with file and line: a short; a voltage source that does not hold a node against
            ground, or holds one that is held at another voltage; a node that no path joins with a
            held one; no voltage source at all.
    """
    if shorts not in get_args(Shorts):
        raise ValueError(f"shorts: got {shorts!r}, expected one of {get_args(Shorts)}")
    root = merged(netlist, shorts, inductors=True)
    held = held_nodes(netlist, root)
    order, index = numbered(netlist, root, held)
    resistors = netlist.resistors
    kept = (resistors.values > 0.0) & (root[resistors.plus] != root[resistors.minus])
    currents = drawn(netlist, index, len(order))
    ends = (index[resistors.plus][kept], index[resistors.minus][kept])
    _refuse_floating(netlist, root, held)
    tiny = np.flatnonzero(kept & (resistors.values < _LEAST))
    if len(tiny):
        ohm = resistors.values[tiny[0]]
        raise netlist.error(
            f"got {ohm:g} ohm, expected 0 or at least {_LEAST:g}", resistors, int(tiny[0])
        )
    return Grid(
        len(order),
        *ends,
        1.0 / resistors.values[kept],
        np.array([held[node] for node in order if node in held]),
        currents=currents,
        names=tuple(netlist.nodes[node] for node in order),
        places=places_of(netlist, order, len(held)),
        _index={name: int(i) for name, i in zip(netlist.nodes, index, strict=True)},
    )


def merged(netlist: Netlist, shorts: Shorts, *, inductors: bool) -> NDArray[np.int64]:
    """[n] of every node the first of those that it is one with."""
    root = list(range(len(netlist.nodes)))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    def unite(branches: Branches, chosen: NDArray[np.bool_]) -> None:
        for i in np.flatnonzero(chosen):
            a, b = find(int(branches.plus[i])), find(int(branches.minus[i]))
            root[max(a, b)] = min(a, b)

    for branches, what in ((netlist.resistors, "ohm"), (netlist.voltages, "volt")):
        zero = (branches.values == 0.0) & (branches.plus != branches.minus)
        if what == "volt":
            # A source of 0 V at ground holds a node, as any other.
            zero &= (branches.plus != GROUND) & (branches.minus != GROUND)
        if zero.any() and shorts == "refuse":
            raise netlist.error(
                f"got a short of 0 {what}, expected none: shorts='merge' makes one node of its two",
                branches,
                int(np.flatnonzero(zero)[0]),
            )
        unite(branches, zero)
    if inductors:
        unite(netlist.inductors, np.ones(len(netlist.inductors), np.bool_))
    return np.array([find(node) for node in range(len(root))])


def held_nodes(netlist: Netlist, root: NDArray[np.int64]) -> dict[int, float]:
    """The voltage of every node that a source holds, ground included."""
    held = {GROUND: 0.0}
    sources = netlist.voltages
    for i, (plus, minus, value) in enumerate(
        zip(root[sources.plus], root[sources.minus], sources.values, strict=True)
    ):
        if plus == minus and value == 0.0:
            continue
        if (plus == GROUND) == (minus == GROUND):
            raise netlist.error(
                f"got a source of {value:g} V between two nodes, expected one end at ground",
                sources,
                i,
            )
        node, volts = (int(plus), value) if minus == GROUND else (int(minus), -value)
        if held.setdefault(node, float(volts)) != volts:
            raise netlist.error(
                f"got {volts:g} V at node {netlist.nodes[node]!r}, expected {held[node]:g} V, "
                "which another source holds it at",
                sources,
                i,
            )
    return held


def numbered(
    netlist: Netlist, root: NDArray[np.int64], held: dict[int, float]
) -> tuple[list[int], NDArray[np.int32]]:
    """The netlist's nodes in the order of the grid, and of every node its index there."""
    roots = [int(node) for node in np.unique(root)]
    order = [node for node in roots if node not in held] + [node for node in roots if node in held]
    at = np.empty(len(netlist.nodes), np.int32)
    at[order] = np.arange(len(order), dtype=np.int32)
    return order, at[root]


def drawn(netlist: Netlist, index: NDArray[np.int32], nodes: int) -> NDArray[np.float64]:
    """[nodes] ampere that the current sources draw from each node."""
    currents = np.zeros(nodes)
    sources = netlist.currents
    np.add.at(currents, index[sources.plus], sources.values)
    np.subtract.at(currents, index[sources.minus], sources.values)
    return currents


def netlist_of(grid: Grid, currents: NDArray[np.float64] | None = None) -> Netlist:
    """A netlist of a grid: R, a source of current for each node that draws, of voltage for held.

    Args:
        currents: [n] ampere; None: the grid's own.
    """
    drawn = grid.currents if currents is None else currents
    if drawn is None:
        drawn = np.zeros(grid.nodes)
    names = list(grid.names or (f"n{i}" for i in range(grid.nodes)))
    ground = names.index("0") if "0" in names else -1
    # Ground is the first node of a netlist.
    order = np.array([i for i in range(grid.nodes) if i != ground])
    at = np.zeros(grid.nodes, np.int32)
    at[order] = np.arange(1, len(order) + 1)
    loads = np.flatnonzero(drawn[: grid.free])
    held = np.array([i for i in range(grid.free, grid.nodes) if i != ground], np.int64)
    nothing = _branches("x", [], [], [])
    return Netlist(
        ("0", *(names[i] for i in order)),
        _branches("r", at[grid.a], at[grid.b], 1.0 / grid.conductance),
        nothing,
        nothing,
        _branches("i", at[loads], np.zeros(len(loads)), drawn[loads]),
        _branches("v", at[held], np.zeros(len(held)), grid.volts[held - grid.free]),
        ((".op",),),
    )


def _branches(kind: str, plus: object, minus: object, values: object) -> Branches:
    value = np.asarray(values, np.float64)
    return Branches(
        tuple(f"{kind}{i}" for i in range(len(value))),
        np.asarray(plus, np.int32),
        np.asarray(minus, np.int32),
        value,
        np.zeros(len(value), np.int64),
    )


def _refuse_floating(netlist: Netlist, root: NDArray[np.int64], held: dict[int, float]) -> None:
    """Names a node that nothing holds, and where it occurs."""
    from quernstone import _core

    reached = np.zeros(len(netlist.nodes), np.uint8)
    reached[list(held)] = 1
    resistors = netlist.resistors
    _core.pim.reach(
        root[resistors.plus].astype(np.int32), root[resistors.minus].astype(np.int32), reached
    )
    floating = np.flatnonzero(reached[root] == 0)
    if not len(floating):
        return
    node = int(floating[0])
    text = (
        f"node {netlist.nodes[node]!r} floats: no path of resistors joins it with ground or a "
        f"voltage source ({len(floating)} nodes in all)"
    )
    for branches in (
        netlist.resistors,
        netlist.currents,
        netlist.capacitors,
        netlist.inductors,
        netlist.voltages,
    ):
        at = np.flatnonzero((branches.plus == node) | (branches.minus == node))
        if len(at):
            raise netlist.error(text, branches, int(at[0]))
    raise ValueError(text)


def places_of(netlist: Netlist, order: list[int], held: int) -> NDArray[np.float64] | None:
    """Where names such as n1_m4_2000_400 put the nodes; None where one does not."""
    places = np.zeros((len(order), 2))
    for i, node in enumerate(order[: len(order) - held]):
        match = _PLACE.fullmatch(netlist.nodes[node])
        if match is None:
            return None
        places[i] = float(match[1]), float(match[2])
    return places
