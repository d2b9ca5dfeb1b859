"""Power grids: networks of resistors between nodes that draw current and nodes held at a voltage.

    L v = G v_held - i        drop = v0 - v = L^-1 i

v0 are the voltages without load. Drops are linear in the currents: those of macros add up.

Axes: n nodes, u of them free, p held at a voltage; m resistors; k sets of currents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone import _core
from quernstone._checks import number
from quernstone._config import num_threads

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """A network of resistors, the last p nodes of which are held at a voltage.

    Raises:
        ValueError: lengths that differ, indices beyond the nodes, a resistor that is not positive
            or joins a node with itself, voltages or currents that are not finite, a node that no
            path joins with one that is held.
    """

    nodes: int
    """n"""
    a: Ints
    """[m] one end of each resistor"""
    b: Ints
    """[m] the other"""
    conductance: Floats
    """[m] siemens"""
    volts: Floats
    """[p] of the held nodes, n - p .. n - 1"""
    currents: Floats | None = None
    """[n] ampere that the nodes draw unless a call says otherwise; None: none"""
    names: tuple[str, ...] = ()
    """Of the nodes; () where they have none."""
    places: Floats | None = None
    """[n, 2] x and y of the nodes in whatever unit, which help to find a good order"""
    shape: tuple[int, int] | None = None
    """Rows and columns, of a mesh: node r * columns + c is in row r and column c."""
    _index: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.volts) <= self.nodes:
            raise ValueError(
                f"volts: got {len(self.volts)} held nodes of {self.nodes}, expected 1 at least"
            )
        if not len(self.a) == len(self.b) == len(self.conductance):
            raise ValueError(
                f"a, b, conductance: got {len(self.a)}, {len(self.b)} and {len(self.conductance)}, "
                "expected as many of each"
            )
        for name, ends in (("a", self.a), ("b", self.b)):
            if ends.dtype != np.int32:
                raise TypeError(f"{name}: got {ends.dtype}, expected int32")
            if len(ends) and not (ends.min() >= 0 and ends.max() < self.nodes):
                raise ValueError(f"{name}: got a node beyond 0 to {self.nodes - 1}")
        if np.any(self.a == self.b):
            at = int(np.flatnonzero(self.a == self.b)[0])
            raise ValueError(f"a, b: resistor {at} joins node {self.a[at]} with itself")
        good = (self.conductance > 0.0) & np.isfinite(self.conductance)
        if not good.all():
            at = int(np.flatnonzero(~good)[0])
            raise ValueError(f"conductance[{at}]: got {self.conductance[at]}, expected more than 0")
        if not np.isfinite(self.volts).all():
            raise ValueError("volts: got a number that is not finite")
        if self.currents is not None:
            _checked("currents", self.currents, self.nodes)
        floating = self.floating()
        if len(floating):
            raise ValueError(
                f"node {self.name(int(floating[0]))} floats: no path joins it with a held node "
                f"({len(floating)} nodes in all)"
            )

    def __repr__(self) -> str:
        what = f"{self.shape[0]} x {self.shape[1]} mesh" if self.shape else "network"
        return f"<Grid {what}: {self.nodes} nodes, {len(self.a)} resistors, {len(self.volts)} held>"

    @property
    def free(self) -> int:
        """u, the nodes that are not held."""
        return self.nodes - len(self.volts)

    def name(self, index: int) -> str:
        """What a node is called in messages."""
        return repr(self.names[index]) if self.names else str(index)

    def node(self, name: str) -> int:
        """The index of a node; names of nodes that were merged have the same.

        Raises:
            ValueError: there is none.
        """
        index = self._index or dict(zip(self.names, range(self.nodes), strict=False))
        if name not in index:
            raise ValueError(f"name: got {name!r}, expected the name of a node")
        return index[name]

    def floating(self) -> NDArray[np.int64]:
        """The nodes that no path joins with a held one."""
        reached = np.zeros(self.nodes, np.uint8)
        reached[self.free :] = 1
        _core.pim.reach(self.a, self.b, reached)
        return np.flatnonzero(reached == 0)

    def scaled(self, factor: float) -> Grid:
        """The grid with every resistance multiplied: so are the drops."""
        if not number("factor", factor) > 0.0:
            raise ValueError(f"factor: got {factor}, expected more than 0")
        return replace(self, conductance=self.conductance / factor)


def mesh(
    rows: int,
    columns: int,
    *,
    resistance: float | tuple[float, float] = 1.0,
    pads: Iterable[tuple[int, int]],
    pad_resistance: float,
    volts: float,
) -> Grid:
    """A plane of nodes in rows and columns, fed through pads.

    Args:
        rows, columns: of the mesh.
        resistance: ohm of a segment, or those of segments along a row and along a column.
        pads: row and column of each.
        pad_resistance: ohm from a pad to the supply.
        volts: of the supply.

    Returns:
        A grid of rows * columns nodes and a last one, the supply, which is held.

    Raises:
        ValueError: an extent below 1, pads outside or none, a resistance that is not positive.
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")
    along, across = resistance if isinstance(resistance, tuple) else (resistance, resistance)
    for name, ohm in (
        ("resistance", along),
        ("resistance", across),
        ("pad_resistance", pad_resistance),
    ):
        if not number(name, ohm) > 0.0:
            raise ValueError(f"{name}: got {ohm}, expected more than 0")
    index = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    feet = []
    for row, column in pads:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"pads: got {(row, column)}, expected one in {(rows, columns)}")
        feet.append(index[row, column])
    if not feet:
        raise ValueError("pads: got none, expected one at least")
    supply = rows * columns
    ends = [
        (index[:, :-1].ravel(), index[:, 1:].ravel(), 1.0 / along),
        (index[:-1].ravel(), index[1:].ravel(), 1.0 / across),
        (np.array(feet, np.int32), np.full(len(feet), supply, np.int32), 1.0 / pad_resistance),
    ]
    return Grid(
        supply + 1,
        np.concatenate([a for a, _, _ in ends]),
        np.concatenate([b for _, b, _ in ends]),
        np.concatenate([np.full(len(a), g) for a, _, g in ends]),
        np.array([volts], np.float64),
        names=(*(f"n1_m1_{c}_{r}" for r in range(rows) for c in range(columns)), "supply"),
        shape=(rows, columns),
    )


class Factor:
    """A grid that has been factored: solves for any number of sets of currents.

    Source: sparse Cholesky factorisation in an order of nested dissection (George, "Nested
    dissection of a regular finite element mesh", 1973), supernodal and multifrontal. The oracles
    are ngspice and SciPy's SuperLU.
    """

    def __init__(self, grid: Grid) -> None:
        """See `factor`."""
        self.grid = grid
        free = grid.free
        inner = (grid.a < free) & (grid.b < free)
        ground = np.zeros(free)
        supply = np.zeros(free)
        for foot, top in ((grid.a, grid.b), (grid.b, grid.a)):
            held = (foot < free) & (top >= free)
            np.add.at(ground, foot[held], grid.conductance[held])
            into = grid.conductance[held] * grid.volts[top[held] - free]
            np.add.at(supply, foot[held], into)
        x = y = None
        if grid.places is not None:
            x, y = (np.ascontiguousarray(grid.places[:free, axis]) for axis in (0, 1))
        try:
            self._core = _core.pim.Cholesky(
                grid.a[inner], grid.b[inner], grid.conductance[inner], ground, x, y
            )
        except ValueError as error:
            at = str(error).partition("pivot of node: got ")[2].partition(",")[0]
            if not at:
                raise
            raise ValueError(
                f"the grid is singular in float64 at node {grid.name(int(at))}: its conductances "
                "span too many orders of magnitude"
            ) from error
        self.idle: Floats = np.empty(grid.nodes)
        """[n] voltages without load"""
        self.idle[free:] = grid.volts
        self._solve(supply[None], self.idle[None])

    def __repr__(self) -> str:
        return f"<Factor of {self.grid!r}, {self.nonzeros:,} entries>"

    @property
    def nonzeros(self) -> int:
        """Entries of L."""
        return int(self._core.nonzeros)

    @property
    def stored_bytes(self) -> int:
        """What a solve reads twice: L with the zeros that keep its panels dense."""
        return 8 * int(self._core.stored)

    @property
    def operations(self) -> float:
        """Multiplications and additions of the factorisation."""
        return float(self._core.operations)

    def drop(self, currents: ArrayLike | None = None, out: Floats | None = None) -> Floats:
        """What the voltages fall by.

        Args:
            currents: [..., n] ampere that each node draws, negative where it gives; those of held
                nodes mean nothing. None: the grid's own.
            out: [..., n] float64 that is written to.

        Returns:
            [..., n] volts, 0 at held nodes. Results do not depend on the number of threads; on the
            number of sets of currents by rounding alone.

        Raises:
            ValueError: another shape, or a current that is not finite.
        """
        grid = self.grid
        if currents is None:
            if grid.currents is None:
                raise ValueError("currents: got None, expected currents: the grid has none")
            currents = grid.currents
        x = _checked("currents", currents, grid.nodes)
        if out is None:
            out = np.empty(x.shape)
        elif out.shape != x.shape or out.dtype != np.float64 or not out.flags.c_contiguous:
            raise ValueError(
                f"out: got {out.dtype} {out.shape}, expected contiguous float64 {x.shape}"
            )
        flat, result = x.reshape(-1, grid.nodes), out.reshape(-1, grid.nodes)
        result[:, grid.free :] = 0.0
        self._solve(flat, result)
        return out

    def solve(self, currents: ArrayLike | None = None) -> Floats:
        """The voltages of all nodes: [..., n] volts for currents [..., n]. See `drop`."""
        drop = self.drop(currents)
        return np.subtract(self.idle, drop, out=drop)

    def _solve(self, currents: Floats, out: Floats) -> None:
        free = self.grid.free
        if len(currents) and free:
            self._core.solve(currents[:, :free], out[:, :free], num_threads())


def factor(grid: Grid) -> Factor:
    """Factors a grid once, to solve it for many currents.

    Raises:
        ValueError: the grid is singular in float64; a node is named.
    """
    return Factor(grid)


class Response:
    """What each ampere of a macro does to the nodes: drops of whole traces by superposition.

        drop[t, o] = sum over m of currents[t, m] * matrix[m, o]

    Axes: c macros, o nodes, t cycles.

    Args:
        factor: of the grid.
        shares: [c, n] how a macro's current spreads over the nodes; each row adds up to 1.

    Raises:
        ValueError: no macros, another shape, shares below 0 or that do not add up to 1; in calls
            currents of another shape or that are not finite.
        TypeError: complex numbers.
    """

    def __init__(self, factor: Factor, shares: ArrayLike) -> None:
        x = _checked("shares", shares, factor.grid.nodes)
        if x.ndim != 2:
            raise ValueError(f"shares: got {x.ndim} axes, expected [macros, nodes]")
        if len(x) == 0:
            raise ValueError("shares: got 0 macros, expected 1 or more")
        if np.any(x < 0.0) or not np.allclose(x.sum(axis=1), 1.0, rtol=0.0, atol=1e-9):
            raise ValueError("shares: got rows that do not add up to 1, expected shares from 0 on")
        self.grid = factor.grid
        self.shares = x
        self.matrix: Floats = factor.drop(x)
        """[c, n] volts an ampere"""
        self._screen: _Screen | None = None

    def drop(self, currents: ArrayLike, nodes: NDArray[np.int64] | None = None) -> Floats:
        """Drops of all nodes or some: [..., o] volts for currents [..., c]."""
        x = _checked("currents", currents, len(self.matrix))
        matrix = self.matrix if nodes is None else self.matrix[:, nodes]
        return np.asarray(x @ matrix)

    def worst(self, currents: ArrayLike) -> Floats:
        """The worst drop within each macro: [..., c] volts for currents [..., c] of 0 or more.

        Exact: scores of float choose the few nodes of a macro that could be its worst, by a bound
        of what a score is off by, and the drops of these are summed in double.

        Raises:
            ValueError: a negative current.
        """
        x = _checked("currents", currents, len(self.matrix))
        if x.size and x.min() < 0.0:
            raise ValueError(f"currents: got {x.min()}, expected 0 or more")
        if self._screen is None:
            self._screen = _Screen(self.matrix, self.shares)
        return self._screen.worst(x.reshape(-1, len(self.matrix))).reshape(x.shape)

    def peaks(self) -> NDArray[np.int64]:
        """[c] of each macro the node that is worst when all macros draw the same current."""
        total = self.matrix.sum(axis=0)
        return np.array(
            [int(np.argmax(np.where(row > 0.0, total, -np.inf))) for row in self.shares]
        )

    def between_macros(self) -> Floats:
        """[c, c] volts that the drop at a macro's `peaks` rises by for each ampere of another.

        Row i times the currents of all macros is the drop of macro i.
        """
        return np.ascontiguousarray(self.matrix[:, self.peaks()].T)


class _Screen:
    """Drops of the nodes of macros from a few sums of currents, to see which are the worst.

    What currents do to the nodes of a macro has few degrees of freedom, since no current but its
    own flows into it: columns of the response are nearly of low rank, C = A V + R. A score is
    x A V. It is off by |x R| at most, and by what rounding to float adds.

    Axes: c macros, o nodes of all macros, one macro's after another's; q scores.
    """

    STEP = 8
    """What q and one are a multiple of."""
    TILE = 16
    """Nodes that are scored together."""
    ENOUGH = 2e-3
    """Share of the worst drop by which scores may be off without rounding."""

    def __init__(self, matrix: Floats, shares: Floats) -> None:
        macros = len(matrix)
        nodes = [np.flatnonzero(share > 0.0) for share in shares]
        self.begin = np.cumsum([0, *(len(at) for at in nodes)])
        self.response = np.ascontiguousarray(matrix.T[np.concatenate(nodes)])
        # The largest number is 1: float holds what is 1e-38 of it.
        unit = 1.0 / max(float(matrix.max()), np.finfo(np.float64).tiny)
        parts = [unit * matrix[:, at] for at in nodes]
        bases = [_spanning(c) for c in parts]
        for scores in range(self.STEP - 1, macros + self.STEP, self.STEP):
            fits = [
                (c, a[:, :scores], a[:, :scores].T @ c) for c, a in zip(parts, bases, strict=True)
            ]
            off = np.stack([np.abs(c - a @ v).max(axis=1) for c, a, v in fits])
            if (off.sum(axis=1) <= self.ENOUGH).all():
                break
        # Twice what as many roundings add, for those of the bound itself: csrc/pim/README.md.
        rounding = (macros + scores + 8) * float(np.finfo(np.float32).eps)
        self.basis = np.zeros((macros, macros, scores + 1), np.float32)
        for m, (_, a, v) in enumerate(fits):
            self.basis[m, :, : a.shape[1]] = a
            size = (np.abs(a) @ np.abs(v)).max(axis=1)
            self.basis[m, :, scores] = off[m] + rounding * (off[m] + size)
        self.places = np.concatenate([self._tiles(v, scores) for _, _, v in fits])

    def worst(self, currents: Floats) -> Floats:
        """[t, c] of currents [t, c]."""
        out = np.empty(currents.shape)
        peak = float(currents.max(initial=0.0))
        unit = 1.0 / peak if peak > np.finfo(np.float64).tiny else 1.0
        _core.pim.worst_drops(
            currents, self.response, self.begin, self.basis, self.places, unit, out
        )
        return out

    def _tiles(self, places: Floats, scores: int) -> NDArray[np.float32]:
        """[q, o] to [o / TILE, scores, TILE], with zeros behind both ends."""
        ranks, nodes = places.shape
        padded = np.zeros((scores, -(-nodes // self.TILE) * self.TILE), np.float32)
        padded[:ranks, :nodes] = places
        return np.ascontiguousarray(padded.reshape(scores, -1, self.TILE).swapaxes(0, 1))


def _spanning(c: Floats) -> Floats:
    """Orthonormal columns, the first of which span those of c [m, n] best: [m, min(m, n)]."""
    if c.shape[0] <= c.shape[1]:
        return np.linalg.eigh(c @ c.T)[1][:, ::-1]
    return np.linalg.qr(c @ np.linalg.eigh(c.T @ c)[1][:, ::-1])[0]


def tile_shares(grid: Grid, rows: int, columns: int) -> Floats:
    """Macros in rows and columns over a mesh, each of which draws evenly from its rectangle.

    Returns:
        [rows * columns, n] shares for `Response`.

    Raises:
        ValueError: the grid is no mesh, or has fewer rows or columns than the macros.
    """
    if grid.shape is None:
        raise ValueError("grid: got a network, expected a mesh")
    if not (1 <= rows <= grid.shape[0] and 1 <= columns <= grid.shape[1]):
        raise ValueError(f"rows, columns: got {(rows, columns)}, expected at most {grid.shape}")
    down = np.arange(grid.shape[0]) * rows // grid.shape[0]
    right = np.arange(grid.shape[1]) * columns // grid.shape[1]
    owner = (down[:, None] * columns + right).ravel()
    shares = np.zeros((rows * columns, grid.nodes))
    shares[owner, np.arange(len(owner))] = 1.0
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _checked(name: str, values: ArrayLike, last: int) -> Floats:
    given = np.asarray(values)
    if np.iscomplexobj(given):
        raise TypeError(f"{name}: got {given.dtype}, expected real numbers")
    x = np.ascontiguousarray(given, np.float64)
    if x.ndim < 1 or x.shape[-1] != last:
        raise ValueError(f"{name}: got shape {x.shape}, expected [..., {last}]")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: got a number that is not finite")
    return x


def pad_lattice(rows: int, columns: int, pitch: int) -> Sequence[tuple[int, int]]:
    """Pads on every `pitch`-th row and column, as far from the edges as from each other."""
    if not 1 <= pitch <= min(rows, columns):
        raise ValueError(f"pitch: got {pitch}, expected 1 to {min(rows, columns)}")
    return [
        (row, column)
        for row in range(pitch // 2, rows, pitch)
        for column in range(pitch // 2, columns, pitch)
    ]
