"""Grids against ngspice, SciPy and golden maps, and what is refused."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from quernstone import spice
from quernstone.machine import Figure, Machine
from quernstone.pim.grid import Grid, Response, factor, mesh, pad_lattice, tile_shares
from quernstone.pim.grid_chip import POWER_GRID, chip_response, macro_rows
from quernstone.pim.grid_netlist import grid_of, netlist_of
from quernstone.pim.heatmap import heatmap
from tests.pim import ngspice

ICCAD = Path(__file__).parents[2] / "../shared/data/iccad2023"
EPSILON = float(np.finfo(np.float64).eps)


def lattice(n: int, seed: int = 0) -> tuple[Grid, NDArray[np.float64]]:
    """A mesh of unequal resistors, and what its nodes draw."""
    rng = np.random.default_rng(seed)
    grid = mesh(
        n,
        n,
        resistance=(0.5, 0.8),
        pads=pad_lattice(n, n, min(n, 8)),
        pad_resistance=0.1,
        volts=0.75,
    )
    grid.conductance[:] *= rng.uniform(0.5, 2.0, len(grid.conductance))
    currents = rng.uniform(0.0, 1e-3, grid.nodes)
    currents[-1] = 0.0
    return grid, currents


def by_scipy(grid: Grid, currents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drops of free nodes by SuperLU, [..., u], and as a bound of its error and ours the norm."""
    a, b, g, n = grid.a, grid.b, grid.conductance, grid.nodes
    rows, columns = np.concatenate([a, b, a, b]), np.concatenate([b, a, a, b])
    matrix = sparse.csc_matrix((np.concatenate([-g, -g, g, g]), (rows, columns)), (n, n))
    u = grid.free
    return np.asarray(splu(matrix[:u, :u].tocsc()).solve(currents[..., :u].T).T)


def tolerance(grid: Grid, drop: NDArray[np.float64]) -> float:
    """Two solvers, each with a backward error of some epsilon: forward it is times the condition.

    The condition of a grid is at most its largest row sum times the largest resistance to what is
    held; for meshes with pads that is below 1e4 here.
    """
    return 1e4 * 8 * EPSILON * float(np.abs(drop).max())


@pytest.mark.parametrize("n", [16, 32, 64])
def test_a_grid_agrees_with_ngspice_to_a_picovolt(n: int, tmp_path: Path) -> None:
    grid, currents = lattice(n)
    found = ngspice.operating_point(netlist_of(grid, currents), tmp_path)
    volts = factor(grid).solve(currents)
    want = np.array([found[name] for name in grid.names])
    assert np.abs(volts - want).max() <= 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 40])
@pytest.mark.parametrize("k", [1, 2, 4, 5, 15, 16, 17, 21, 33])
def test_every_level_agrees_with_scipy(isa: str, n: int, k: int) -> None:
    grid, _ = lattice(n)
    currents = np.random.default_rng(k).normal(size=(k, grid.nodes))
    out = np.full(currents.shape, np.nan)
    got = factor(grid).drop(currents, out=out)
    assert got is out
    want = by_scipy(grid, currents)
    np.testing.assert_allclose(got[:, : grid.free], want, rtol=0.0, atol=tolerance(grid, want))
    assert not got[:, grid.free :].any()


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_connected_network_agrees_with_scipy(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 120))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    held = data.draw(st.integers(1, min(n - 1, 4)))
    more = data.draw(st.integers(0, 3 * n))
    # A random tree joins everything; the rest are pairs anywhere, some of them twice.
    tree = np.array([(i, rng.integers(i)) for i in range(1, n)])
    pairs = np.concatenate([tree, rng.integers(n, size=(more, 2))])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].astype(np.int32)
    places = rng.normal(size=(n, 2)) if data.draw(st.booleans()) else None
    grid = Grid(
        n,
        pairs[:, 0].copy(),
        pairs[:, 1].copy(),
        rng.uniform(0.5, 2.0, len(pairs)),
        rng.normal(size=held),
        places=places,
    )
    currents = rng.normal(size=(3, n))
    got = factor(grid).drop(currents)
    want = by_scipy(grid, currents)
    # A chain of n nodes has a condition of up to 4 n^2.
    atol = 4 * n**2 * 16 * EPSILON * max(float(np.abs(want).max()), 1.0)
    np.testing.assert_allclose(got[:, : grid.free], want, rtol=0.0, atol=atol)


def test_a_chain_of_a_hundred_thousand_nodes_is_solved() -> None:
    n = 100_000
    ends = np.arange(n, dtype=np.int32)
    grid = Grid(n + 1, ends, ends + np.int32(1), np.ones(n), np.array([1.0]))
    currents = np.zeros(n + 1)
    currents[0] = 1e-6
    # One ampere through k resistors in a row.
    want = 1e-6 * (n - np.arange(n + 1.0))
    # The condition of a chain is below n^2.
    np.testing.assert_allclose(
        factor(grid).drop(currents), want, rtol=0.0, atol=n**2 * EPSILON * 0.1
    )


def test_volts_are_those_without_load_less_the_drop() -> None:
    grid, currents = lattice(9)
    found = factor(grid)
    np.testing.assert_allclose(found.idle, 0.75, rtol=1e-12)
    np.testing.assert_array_equal(found.solve(currents), found.idle - found.drop(currents))
    assert found.solve(currents)[-1] == 0.75


def test_the_current_of_the_pads_is_what_the_nodes_draw() -> None:
    grid, currents = lattice(20)
    volts = factor(grid).solve(currents)
    feet = grid.b == grid.nodes - 1
    into = ((0.75 - volts[grid.a[feet]]) * grid.conductance[feet]).sum()
    assert into == pytest.approx(currents.sum(), rel=1e-11)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    import torch

    grid, _ = lattice(30)
    currents = np.random.default_rng(0).normal(size=(50, grid.nodes))
    found = factor(grid)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = found.drop(currents)
        torch.set_num_threads(2)
        two = found.drop(currents)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one, two)


@pytest.mark.data("iccad2023")
@pytest.mark.parametrize("case", ["testcase1", "testcase11", "testcase13"])
def test_contest_cases_meet_their_golden_maps(case: str) -> None:
    netlist = spice.read(ICCAD / case / "netlist.sp.gz")
    grid = grid_of(netlist)
    drop = factor(grid).drop()
    with gzip.open(ICCAD / case / "ir_drop_map.csv.gz") as file:
        golden = np.loadtxt(file, delimiter=",")
    assert drop.max() == pytest.approx(golden.max(), rel=0.02)
    lowest = [i for i in range(grid.free) if "_m1_" in grid.names[i]]
    assert grid.places is not None
    at = np.round(grid.places[lowest] / 2000).astype(int)
    # The raster ends before the last row of some cases.
    inside = (at < golden.shape).all(axis=1)
    assert inside.mean() > 0.95
    want = golden[at[inside, 0], at[inside, 1]]
    error = drop[lowest][inside] - want
    assert np.sqrt(np.mean(error**2)) <= 0.02 * np.sqrt(np.mean(want**2))


def test_macros_responses_add_up_to_direct_solves() -> None:
    grid, _ = lattice(32)
    found = factor(grid)
    response = Response(found, tile_shares(grid, 4, 4))
    currents = np.random.default_rng(3).uniform(0.0, 0.2, (100, 16))
    direct = found.drop(currents @ response.shares)
    np.testing.assert_allclose(response.drop(currents), direct, rtol=0.0, atol=1e-9)
    owner = response.shares > 0.0
    want = np.stack([direct[:, nodes].max(axis=1) for nodes in owner], axis=1)
    np.testing.assert_allclose(response.worst(currents), want, rtol=0.0, atol=1e-9)
    some = np.array([5, 700])
    np.testing.assert_allclose(response.drop(currents, some), direct[:, some], rtol=0.0, atol=1e-9)


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=20)
def test_the_worst_drop_is_exact_however_unequal_the_currents(seed: int, quiet: float) -> None:
    rng = np.random.default_rng(seed)
    grid, _ = lattice(12, seed)
    response = Response(factor(grid), tile_shares(grid, 3, 2))
    currents = rng.exponential(size=(20, 6)) * (rng.random((20, 6)) > quiet)
    drops = currents @ response.matrix
    want = [drops[:, share > 0.0].max(axis=1) for share in response.shares]
    np.testing.assert_allclose(response.worst(currents), np.transpose(want), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("cycles", [0, 1, 15, 16, 17, 255, 256, 257, 531])
def test_worst_drops_do_not_depend_on_level_or_block(cycles: int, isa: str) -> None:
    grid, _ = lattice(20)
    response = Response(factor(grid), tile_shares(grid, 3, 5))
    currents = np.random.default_rng(cycles).uniform(0.0, 0.2, (cycles, 15))
    currents[::3] = 0.0
    currents[1::7] *= 1e-36
    drops = currents @ response.matrix
    want = np.empty((cycles, 15))
    for m, share in enumerate(response.shares):
        want[:, m] = drops[:, share > 0.0].max(axis=1)
    np.testing.assert_allclose(response.worst(currents), want, rtol=1e-12, atol=0.0)


def test_the_worst_of_nodes_that_are_alike_is_exact() -> None:
    grid, _ = lattice(24)
    shares = np.zeros((40, grid.nodes))
    # One node, two, or many, which macros share.
    for m, share in enumerate(shares):
        share[m * 7 : m * 7 + 1 + m % 23] = 1.0 / (1 + m % 23)
    response = Response(factor(grid), shares)
    currents = np.random.default_rng(1).choice([0.0, 0.1], (50, 40))
    drops = currents @ response.matrix
    want = [drops[:, share > 0.0].max(axis=1) for share in shares]
    np.testing.assert_allclose(response.worst(currents), np.transpose(want), rtol=1e-12, atol=0.0)


def test_the_drop_follows_the_resistances() -> None:
    grid, currents = lattice(8)
    want = 3.0 * factor(grid).drop(currents)
    np.testing.assert_allclose(factor(grid.scaled(3.0)).drop(currents), want, rtol=1e-12)


BRANCH = np.array([0], np.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mesh(0, 3, pads=[(0, 0)], pad_resistance=1, volts=1), "rows: got 0"),
        (lambda: mesh(3, 3, pads=[], pad_resistance=1, volts=1), "pads: got none"),
        (lambda: mesh(3, 3, pads=[(3, 0)], pad_resistance=1, volts=1), "pads: got (3, 0)"),
        (lambda: mesh(3, 3, pads=[(0, 0)], pad_resistance=0, volts=1), "pad_resistance: got 0"),
        (
            lambda: mesh(3, 3, resistance=-1.0, pads=[(0, 0)], pad_resistance=1, volts=1),
            "resistance: got -1.0",
        ),
        (lambda: Grid(3, BRANCH, BRANCH + 2, np.ones(1), np.ones(1)), "node 1 floats"),
        (lambda: Grid(2, BRANCH, BRANCH, np.ones(1), np.ones(1)), "joins node 0 with itself"),
        (lambda: Grid(2, BRANCH, BRANCH + 2, np.ones(1), np.ones(1)), "b: got a node beyond"),
        (lambda: Grid(2, BRANCH, BRANCH + 1, -np.ones(1), np.ones(1)), "conductance[0]: got -1.0"),
        (lambda: Grid(2, BRANCH, BRANCH + 1, np.ones(1), np.ones(0)), "volts: got 0 held"),
        (lambda: Grid(2, BRANCH, BRANCH + 1, np.ones(1), np.array([np.nan])), "not finite"),
        (lambda: pad_lattice(4, 4, 5), "pitch: got 5"),
    ],
)
def test_what_is_no_grid_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]


def test_conductances_beyond_float64_name_a_node() -> None:
    ends = np.arange(2, dtype=np.int32)
    # 1e20 siemens between two nodes: their bond to what is held is below its rounding.
    grid = Grid(3, ends, ends + np.int32(1), np.array([1e20, 1e-20]), np.ones(1))
    with pytest.raises(ValueError, match=r"singular in float64 at node \d"):
        factor(grid)


def test_currents_of_another_shape_or_that_are_no_numbers_are_refused() -> None:
    grid, currents = lattice(4)
    found = factor(grid)
    with pytest.raises(ValueError, match=r"currents: got shape \(3,\), expected \[..., 17\]"):
        found.drop(np.ones(3))
    with pytest.raises(ValueError, match="currents: got a number that is not finite"):
        found.drop(np.full(grid.nodes, np.inf))
    with pytest.raises(ValueError, match="currents: got None"):
        found.drop()
    with pytest.raises(ValueError, match="out: got"):
        found.drop(currents, out=np.empty(3))
    with pytest.raises(ValueError, match="shares: got rows that do not add up"):
        Response(found, np.ones((2, grid.nodes)))
    with pytest.raises(ValueError, match="expected 0 or more"):
        Response(found, tile_shares(grid, 2, 2)).worst(-np.ones((3, 4)))


def test_a_response_is_of_real_shares_of_some_macros_and_to_real_currents() -> None:
    grid, currents = lattice(4)
    found = factor(grid)
    with pytest.raises(ValueError, match="shares: got 0 macros, expected 1 or more"):
        Response(found, np.empty((0, grid.nodes)))
    shares = tile_shares(grid, 2, 2)
    with pytest.raises(TypeError, match="shares: got complex128, expected real numbers"):
        Response(found, shares.astype(complex))
    response = Response(found, shares)
    for call in (response.drop, response.worst):
        with pytest.raises(TypeError, match="currents: got complex64, expected real numbers"):
            call(np.ones((3, 4), np.complex64))
    with pytest.raises(TypeError, match="currents: got complex128, expected real numbers"):
        found.drop(currents + 0j)
    assert response.worst(np.empty((0, 4))).shape == (0, 4)


CHIP = Machine(
    "chip",
    {
        "chip.macros": Figure(6, "1", "assumed"),
        "macro.power": Figure(0.5, "W", "assumed"),
        "supply.voltage": Figure(0.75, "V", "assumed"),
        "signoff.drop": Figure(140.0, "mV", "assumed"),
    },
)
SMALL = POWER_GRID.with_figures(
    {
        "grid.rows": Figure(20, "1", "assumed"),
        "grid.columns": Figure(21, "1", "assumed"),
        "grid.anisotropy": Figure(2.0, "1", "assumed"),
        "pad.pitch": Figure(7, "1", "assumed"),
    }
)


def test_a_chips_grid_drops_at_full_power_by_what_sign_off_allows() -> None:
    response = chip_response(CHIP, SMALL)
    full = np.full(6, 0.5 / 0.75)
    assert response.drop(full).max() == pytest.approx(0.14, rel=1e-12)
    assert response.worst(full).max() == pytest.approx(0.14, rel=1e-12)
    between = response.between_macros()
    np.testing.assert_allclose(between @ full, response.worst(full), rtol=1e-12)
    assert between.min() > 0.0


@pytest.mark.parametrize(("macros", "rows"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (64, (8, 8))])
def test_macros_lie_as_square_as_their_number_allows(macros: int, rows: tuple[int, int]) -> None:
    assert macro_rows(macros) == rows


def test_a_heat_map_shows_every_node_and_the_macros_borders() -> None:
    grid, currents = lattice(8)
    drop = factor(grid).drop(currents)
    figure = heatmap(grid, drop, tiles=(2, 4), title="one cycle")
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), 1e3 * drop[:64].reshape(8, 8))
    assert len(axes.lines) == 1 + 3
    with pytest.raises(ValueError, match=r"drop: got shape \(3,\), expected \(65,\)"):
        heatmap(grid, np.ones(3))


def test_a_drop_that_would_be_rounding_alone_is_refused() -> None:
    # 1 to 2 in series with 1e30 of it: eliminated exactly, what is left of the diagonal is not 0.
    text = "V1 a 0 1\nR1 a b 1e-15\nR2 b c 1e15\nR3 c d 1e-15\nI1 d 0 1u\n.end"
    with pytest.raises(ValueError, match=r"singular in float64 at node '[cd]'"):
        factor(grid_of(spice.parse(text)))


def test_a_resistance_without_a_finite_inverse_is_blamed_on_its_line() -> None:
    netlist = spice.parse("V1 a 0 1\nR1 a b 1e-300\n.end")
    with pytest.raises(spice.SpiceError, match=r"netlist:2: r1: got 1e-300 ohm"):
        grid_of(netlist)
