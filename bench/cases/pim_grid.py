"""Grids, currents and traces for the benchmarks of power grids."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from quernstone.pim.grid import Grid, mesh, pad_lattice

Floats = NDArray[np.float64]
SIDE = 128
SETS = 64


@functools.lru_cache(maxsize=4)
def square(side: int = SIDE, seed: int = 0) -> Grid:
    """A mesh of unequal resistors under a lattice of pads."""
    grid = mesh(
        side,
        side,
        resistance=(0.05, 0.08),
        pads=pad_lattice(side, side, 16),
        pad_resistance=0.02,
        volts=0.75,
    )
    grid.conductance[:] *= np.random.default_rng(seed).uniform(0.5, 2.0, len(grid.conductance))
    return grid


def currents(grid: Grid, sets: int = SETS, seed: int = 1) -> Floats:
    """[sets, n] ampere, none at the supply."""
    drawn = np.random.default_rng(seed).uniform(0.0, 1e-3, (sets, grid.nodes))
    drawn[:, grid.free :] = 0.0
    return drawn
