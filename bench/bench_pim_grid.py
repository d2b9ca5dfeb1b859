"""Power grids: factoring and solving beside SciPy, reading netlists, traces, AIM's claim."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from quernstone import spice
from quernstone.bench.cases.pim_grid import SETS, SIDE, currents, square
from quernstone.bench.cases.pim_networks import NETWORKS
from quernstone.bench.harness import Absent, Check, Measure, Named, Rival, rows
from quernstone.bench.machine import version
from quernstone.bench.rows import Spread
from quernstone.pim.array import Array
from quernstone.pim.chip import CHIPS
from quernstone.pim.currents import Claim, claim, loads
from quernstone.pim.grid import Factor, Grid, Response, factor
from quernstone.pim.grid_chip import chip_response
from quernstone.pim.grid_netlist import netlist_of
from quernstone.pim.layers import nearest_codes, weights_of
from quernstone.pim.system import chip_macro
from quernstone.pim.work import network_work

Floats = NDArray[np.float64]
ORDERINGS = ("MMD_AT_PLUS_A", "COLAMD", "MMD_ATA")
CHIP = CHIPS["aim-7nm-256tops"]


@dataclass(frozen=True)
class Solve:
    """One of the three things that a grid is asked for."""

    what: Literal["factor", "solve", "solve64"]
    threads: int = 1
    quick: bool = True

    @property
    def id(self) -> str:
        return f"pim.grid.{self.what}.{SIDE}.t{self.threads}"


@functools.lru_cache(maxsize=1)
def _matrix(grid: Grid) -> Any:
    import scipy.sparse as sparse

    a, b, g = grid.a, grid.b, grid.conductance
    rows_, columns = np.concatenate([a, b, a, b]), np.concatenate([b, a, a, b])
    whole = sparse.csc_matrix((np.concatenate([-g, -g, g, g]), (rows_, columns)))
    return whole[: grid.free, : grid.free].tocsc()


def _scipy(what: str, grid: Grid, drawn: Floats, check: Check) -> list[Rival | Absent]:
    try:
        from scipy.sparse.linalg import splu
    except ImportError:
        return [Absent("SciPy", "pip install scipy")]
    matrix = _matrix(grid)
    rivals: list[Rival | Absent] = []
    right = np.asfortranarray(drawn[:, : grid.free].T)
    for ordering in ORDERINGS:
        make = functools.partial(
            splu,
            matrix,
            permc_spec=ordering,
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        lu = make()
        run = make if what == "factor" else functools.partial(lu.solve, right)

        def padded(got: Any, right: Floats = right) -> Floats:
            found = got.solve(right) if what == "factor" else got
            out = np.zeros((right.shape[1], grid.nodes))
            out[:, : grid.free] = found.T
            return out

        rival_check = Check(lambda got, p=padded: check.error(p(got)), check.tolerance)  # type: ignore[misc]
        versions = {"scipy": version("scipy") or "?"}
        rivals.append(Rival(f"SciPy splu, {ordering}", run, rival_check, versions))
    return rivals


@rows(Solve("factor"), Solve("solve"), Solve("solve64"), Solve("solve64", threads=2))
def bench_solve(case: Solve, measure: Measure) -> None:
    grid = square()
    drawn = currents(grid, SETS if case.what == "solve64" else 1)
    found = factor(grid)
    want = found.drop(drawn)

    # What comes back, put into Kirchhoff's law: no solver is trusted with another's result.
    def residual(drop: Floats) -> float:
        flow = grid.conductance * (drop[:, grid.a] - drop[:, grid.b])
        left = drawn.copy()
        for row, one in zip(left, flow, strict=True):
            row -= np.bincount(grid.a, one, grid.nodes) - np.bincount(grid.b, one, grid.nodes)
        return float(np.abs(left[:, : grid.free]).max())

    check = Check(residual, 1e-13)
    out = np.empty_like(want)
    if case.what == "factor":

        def error(made: Factor) -> float:
            return residual(made.drop(drawn))

        measure.speed(
            what=f"order and factor a {SIDE} x {SIDE} grid",
            ours=lambda: factor(grid),
            check=Check(error, check.tolerance),
            rivals=_scipy(case.what, grid, drawn, check),
            notes=[
                f"{found.nonzeros:,} entries of L, {found.operations / 1e6:.0f} M multiply-adds; "
                "checks of the input and the voltages without load included"
            ],
        )
        return
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        moved = 2.0 * found.stored_bytes * (SETS / 16 if case.what == "solve64" else 1)
        one = drawn[:1]
        rivals = _scipy(case.what, grid, drawn, check)
        if case.what == "solve64":

            def singly() -> Floats:
                for k in range(SETS):
                    found.drop(drawn[k], out=out[k])
                return out

            rivals.append(Rival("64 single solves", singly, check))
        measure.speed(
            what=f"solve a factored {SIDE} x {SIDE} grid for {len(drawn)} sets of currents",
            ours=lambda: found.drop(drawn if len(drawn) > 1 else one, out=out),
            check=check,
            rivals=rivals,
            work=4.0 * found.nonzeros * len(drawn),
            moved=moved,
            notes=[f"L is read twice for each 16 sets: {moved / 1e6:.1f} MB a call"],
        )
    finally:
        torch.set_num_threads(before)


@rows(Named("pim.grid.netlist.lines", quick=True))
def bench_netlist(case: Named, measure: Measure) -> None:
    grid = square()
    text = spice.text(netlist_of(grid, currents(grid)[0]))
    lines = text.count("\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.sp"
        path.write_text(text)

        def rate() -> Spread:
            rates = []
            for _ in range(5 if measure.quick else 21):
                begin = time.perf_counter()
                netlist = spice.read(path)
                rates.append(lines / (time.perf_counter() - begin) / 1e3)
            assert len(netlist.resistors) == len(grid.a)
            return Spread.of(rates)

        measure.value(
            what=f"read a netlist of {lines:,} lines",
            unit="klines/s",
            compute=rate,
            smaller_is_better=False,
        )


def _minilm() -> tuple[Any, ...]:
    return _layers("minilm")


@functools.lru_cache(maxsize=2)
def _layers(name: str, vectors: int = 128) -> tuple[Any, ...]:
    """The integers of a network and of its inputs, layer by layer."""
    network = NETWORKS[name]
    graph = network.load()
    weights = {
        weight.node.name: nearest_codes(weight, graph.constants[weight.constant]).stored
        for weight in weights_of(graph)
        if weight.role == "weight"
    }
    codes = {at: np.asarray(stored, np.int8) for at, stored in weights.items()}
    inputs = network.inputs("held-out")[0]
    # The operands of attention are known when it runs: they have no HR.
    return network_work(graph, inputs, codes, vectors=vectors, attention=False).layers


@functools.lru_cache(maxsize=1)
def _response() -> Response:
    return chip_response(CHIP)


@rows(Named("pim.grid.trace.minilm", quick=False))
def bench_trace(case: Named, measure: Measure) -> None:
    """Rtog of every macro in every cycle to the worst drop in each macro."""
    macro, response = chip_macro(CHIP), _response()
    macros = len(response.matrix)
    arrays = [(Array(work.weights, macro), work.inputs[:128]) for work in _minilm()]

    def rates() -> list[Floats]:
        """[t, tiles] of each layer."""
        found = [array.toggles(x, "macro").counts / macro.cells for array, x in arrays]
        return [np.concatenate(list(one), axis=1) for one in found]

    begin = time.perf_counter()
    tiles = np.concatenate([one.T for one in rates()])
    counted = time.perf_counter() - begin
    # As many tiles at a time as there are macros.
    rounds = -(-len(tiles) // macros)
    rtog = np.zeros((rounds, macros, tiles.shape[1]))
    rtog.reshape(rounds * macros, -1)[: len(tiles)] = tiles
    full = CHIP.value("macro.power", "W") / CHIP.value("supply.voltage", "V")
    everything = np.ascontiguousarray(full * rtog.swapaxes(1, 2)).reshape(-1, macros)
    solver = factor(response.grid)
    chosen = np.random.default_rng(0).integers(len(everything), size=64)
    direct = solver.drop(everything[chosen] @ response.shares)
    want = np.stack([direct[:, s > 0.0].max(axis=1) for s in response.shares], axis=1)
    measure.speed(
        what=f"MiniLM, 128 tokens: {len(everything):,} cycles of {everything.shape[1]} macros, "
        "Rtog to the worst drop in each",
        ours=lambda: response.worst(everything),
        check=Check(lambda got: float(np.abs(got[chosen] - want).max()), 1e-9),
        unit="ms",
        notes=[
            "superposition; compared with direct solves of 64 of the cycles",
            f"Rtog itself takes {1e3 * counted:.0f} ms, weights programmed included",
        ],
    )


@dataclass(frozen=True)
class Foretelling:
    """A network, a rate and what it is to foretell."""

    network: str
    pair: Literal["rtog_current", "rtog_drop", "hamming_worst", "hamming_mean"]
    threads: int = 1
    quick: bool = False

    @property
    def id(self) -> str:
        return f"pim.claim.{self.network}.{self.pair}"


@functools.lru_cache(maxsize=8)
def _claim(name: str) -> Claim:
    return claim(loads(_layers(name, 16), chip_macro(CHIP), _response(), CHIP, vectors=16))


PAIRS = {
    "rtog_current": "Rtog and the current of adder trees, each macro and cycle",
    "rtog_drop": "Rtog and the worst drop in the macro, each cycle",
    "hamming_worst": "HR and the worst drop in the macro over all cycles",
    "hamming_mean": "HR and the mean drop in the macro",
}
CLAIMED = ("detector", "recogniser", "classifier", "magika", "minilm")


@rows(*(Foretelling(name, pair) for name in CLAIMED for pair in PAIRS))  # type: ignore[arg-type]
def bench_claim(case: Foretelling, measure: Measure) -> None:
    """The current comes from adder trees and accumulators bit by bit, not from Rtog."""
    found = getattr(_claim(case.network), case.pair)
    measure.value(
        what=f"{case.network}: {PAIRS[case.pair]}, Pearson",
        unit="r",
        kind="simulated",
        compute=lambda: found.pearson,
        smaller_is_better=False,
        notes=[f"Spearman {found.spearman:+.3f}; {found.samples:,} samples; model, not silicon"],
    )
