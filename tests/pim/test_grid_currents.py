"""Adder trees against Python's integers, and correlations against SciPy."""

import re

import numpy as np
import pytest
from scipy import stats

from quernstone.machine import Figure, Machine
from quernstone.pim import reference_tree
from quernstone.pim.api import toggle_count
from quernstone.pim.currents import (
    SWITCHING,
    adder_tree_toggles,
    charge,
    claim,
    loads,
    pearson,
    spearman,
)
from quernstone.pim.grid import Response, factor, mesh, pad_lattice, tile_shares
from quernstone.pim.macro import Macro
from quernstone.pim.work import Work

CHIP = Machine(
    "chip",
    {
        "macro.power": Figure(0.25, "W", "assumed"),
        "macro.static_share": Figure(0.1, "1", "assumed"),
        "supply.voltage": Figure(0.75, "V", "assumed"),
    },
)


def integers(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, *, signed: bool
) -> np.ndarray:
    low = -(1 << (bits - 1)) if signed else 0
    return rng.integers(low, low + (1 << bits), shape, dtype=np.int32)


@pytest.mark.parametrize(("rows", "banks"), [(1, 1), (2, 3), (5, 16), (8, 17), (13, 40)])
@pytest.mark.parametrize(
    ("weight_bits", "input_bits", "signed", "order"),
    [(8, 8, True, "lsb"), (8, 8, False, "msb"), (1, 1, True, "lsb"), (4, 3, True, "msb"),
     (16, 16, True, "lsb"), (16, 16, False, "msb")],
)  # fmt: skip
def test_every_bit_of_the_trees_is_counted(
    isa: str, rows: int, banks: int, weight_bits: int, input_bits: int, signed: bool, order: str
) -> None:
    macro = Macro(
        rows,
        banks,
        weight_bits,
        input_bits,
        weight_signed=signed,
        input_signed=signed,
        order=order,  # type: ignore[arg-type]
    )
    rng = np.random.default_rng(rows)
    w = integers(rng, (banks + banks // 2, rows + 3), weight_bits, signed=signed)
    x = integers(rng, (3, rows + 3), input_bits, signed=signed)
    got = adder_tree_toggles(w, x, macro)
    np.testing.assert_array_equal(got, reference_tree.adder_tree_toggles(w, x, macro))


def test_the_first_stage_is_the_toggles_of_cell_products() -> None:
    macro = Macro(64, 20)
    rng = np.random.default_rng(0)
    w = integers(rng, (50, 150), 8, signed=True)
    x = integers(rng, (9, 150), 8, signed=True)
    got = adder_tree_toggles(w, x, macro)[..., 0]
    want = toggle_count(w, x, macro, resolution="macro").counts
    np.testing.assert_array_equal(got, want.transpose(1, 0, 2))


def test_nothing_switches_where_inputs_or_weights_are_zero() -> None:
    macro = Macro(8, 4)
    rng = np.random.default_rng(0)
    assert not adder_tree_toggles(np.zeros((4, 8), int), rng.integers(-9, 9, (5, 8)), macro).any()
    assert not adder_tree_toggles(rng.integers(-9, 9, (4, 8)), np.zeros((5, 8), int), macro).any()


def test_charges_weigh_the_stages() -> None:
    counts = np.array([[1, 10, 100, 1000]])
    heavy = SWITCHING.with_figures({"switch.adder": Figure(3.0, "1", "assumed")})
    np.testing.assert_array_equal(charge(counts), [1 + 110 + 2000])
    np.testing.assert_array_equal(charge(counts, heavy), [1 + 330 + 2000])


@pytest.mark.parametrize("seed", range(5))
def test_correlations_agree_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 7, 50)
    y = x + rng.normal(size=50).round()
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert np.isnan(pearson(x, np.ones(50)))
    with pytest.raises(ValueError, match="x, y: got 50 and 49"):
        pearson(x, y[1:])


def test_a_network_is_loaded_round_by_round_and_its_drops_are_direct_solves() -> None:
    macro = Macro(16, 8, input_signed=False)
    rng = np.random.default_rng(1)
    layers = [
        Work("a", integers(rng, (20, 30), 8, signed=True), rng.integers(0, 256, (6, 30)), 6),
        Work("b", integers(rng, (8, 16), 8, signed=True), rng.integers(0, 256, (4, 16)), 4),
    ]
    grid = mesh(12, 12, pads=pad_lattice(12, 12, 6), pad_resistance=0.1, volts=0.75)
    solver = factor(grid)
    response = Response(solver, tile_shares(grid, 2, 2))
    rounds = loads(layers, macro, response, CHIP, vectors=5)
    # Six tiles of a and one of b on four macros.
    assert [len(one.names) for one in rounds] == [4, 3]
    assert rounds[0].rtog.shape == (40, 4)
    assert rounds[1].rtog.shape == (32, 3)
    full = 0.25 / 0.75
    drawn = np.full((32, 4), 0.1 * full)
    drawn[:, :3] = rounds[1].current
    direct = solver.drop(drawn @ response.shares)
    for m in range(3):
        want = direct[:, response.shares[m] > 0.0].max(axis=1)
        np.testing.assert_allclose(rounds[1].drop[:, m], want, rtol=0.0, atol=1e-9)
    # Both models of current have the same mean.
    mean = np.mean([one.mean() for r in rounds for one in r.rtog.T])
    assert 0.0 < mean < 0.5
    found = claim(rounds)
    assert found.hamming_bound == 1.0
    assert found.rtog_drop.samples == 40 * 4 + 32 * 3
    assert -1.0 <= found.rtog_drop.spearman <= 1.0


def test_macros_that_are_driven_otherwise_are_refused() -> None:
    for macro in (Macro(zero_gating=True), Macro(cross_vector=False), Macro(idle=1)):
        with pytest.raises(ValueError, match="macro: got lines that are gated, idle or apart"):
            adder_tree_toggles(np.ones((1, 1), int), np.ones((1, 1), int), macro)
    with pytest.raises(ValueError, match=re.escape("weights")):
        adder_tree_toggles(np.full((1, 1), 300), np.ones((1, 1), int), Macro())
    with pytest.raises(ValueError, match="layers: got none"):
        loads([], Macro(), None, CHIP)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds: got none"):
        claim([])
