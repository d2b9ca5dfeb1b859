"""The power grid of a chip of macros: a mesh under pads, as stiff as sign-off needs it."""

from __future__ import annotations

import math

from quernstone.machine import Figure, Machine
from quernstone.pim.grid import Response, factor, mesh, pad_lattice, tile_shares

_MODEL = "model, not silicon: "

POWER_GRID = Machine(
    "mesh-128",
    {
        "grid.rows": Figure(128, "1", "assumed", _MODEL + "16 x 16 nodes a macro of 64"),
        "grid.columns": Figure(128, "1", "assumed", _MODEL + "16 x 16 nodes a macro of 64"),
        "grid.segment": Figure(
            50.0, "mOhm", "assumed", _MODEL + "a sheet of 50 mOhm; scaled to the drop of sign-off"
        ),
        "grid.anisotropy": Figure(
            1.0, "1", "assumed", _MODEL + "resistance along a column over that along a row"
        ),
        "pad.pitch": Figure(16, "1", "assumed", _MODEL + "nodes from pad to pad: one a macro"),
        "pad.resistance": Figure(
            20.0, "mOhm", "assumed", _MODEL + "bump and package; scaled with the mesh"
        ),
    },
)
"""Figures of `chip_response`. Only their ratios matter there, since the grid is scaled."""


def macro_rows(macros: int) -> tuple[int, int]:
    """Rows and columns of macros on a chip, as square as their number allows."""
    if macros < 1:
        raise ValueError(f"macros: got {macros}, expected 1 or more")
    rows = next(r for r in range(math.isqrt(macros), 0, -1) if macros % r == 0)
    return rows, macros // rows


def chip_response(chip: Machine, power_grid: Machine = POWER_GRID) -> Response:
    """What each ampere of a chip's macros does to the voltages of its grid.

    The mesh of `power_grid` is scaled such that the worst drop is `signoff.drop` when every macro
    draws `macro.power` at `supply.voltage`: that drop is what a chip is designed for, the
    resistances are not known.

    Args:
        chip: figures "chip.macros", "macro.power", "supply.voltage" and "signoff.drop".
        power_grid: figures of `POWER_GRID`.

    Returns:
        The response of macros in rows from the top left.

    Raises:
        ValueError: a figure is missing, or the mesh has fewer rows or columns than the macros.

    Source: the model is ours; the paper's drops are of a post-layout grid that is not public.
    """
    volts = chip.value("supply.voltage", "V")
    macros = round(chip.value("chip.macros", "1"))
    rows, columns = (round(power_grid.value(f"grid.{name}", "1")) for name in ("rows", "columns"))
    segment = power_grid.value("grid.segment", "Ohm")
    grid = mesh(
        rows,
        columns,
        resistance=(segment, segment * power_grid.value("grid.anisotropy", "1")),
        pads=pad_lattice(rows, columns, round(power_grid.value("pad.pitch", "1"))),
        pad_resistance=power_grid.value("pad.resistance", "Ohm"),
        volts=volts,
    )
    shares = tile_shares(grid, *macro_rows(macros))
    ampere = chip.value("macro.power", "W") / volts
    worst = factor(grid).drop(ampere * shares.sum(axis=0)).max()
    return Response(factor(grid.scaled(chip.value("signoff.drop", "V") / float(worst))), shares)
