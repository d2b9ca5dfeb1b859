"""Pictures of drops on a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from quernstone.pim.grid import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap(
    grid: Grid,
    drop: ArrayLike,
    *,
    tiles: tuple[int, int] | None = None,
    title: str = "",
) -> Figure:
    """A mesh coloured by drop in millivolt.

    Args:
        grid: a mesh.
        drop: [n] volts.
        tiles: rows and columns of macros, whose borders are drawn.
        title: above the picture.

    Raises:
        ValueError: the grid is no mesh, or drops of another shape.
    """
    from matplotlib.figure import Figure

    if grid.shape is None:
        raise ValueError("grid: got a network, expected a mesh")
    volts = np.asarray(drop, np.float64)
    if volts.shape != (grid.nodes,):
        raise ValueError(f"drop: got shape {volts.shape}, expected ({grid.nodes},)")
    rows, columns = grid.shape
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(1e3 * volts[: rows * columns].reshape(rows, columns), cmap="inferno_r")
    if tiles is not None:
        for r in range(1, tiles[0]):
            axes.axhline(-(-r * rows // tiles[0]) - 0.5, color="white", linewidth=0.4)
        for c in range(1, tiles[1]):
            axes.axvline(-(-c * columns // tiles[1]) - 0.5, color="white", linewidth=0.4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="drop, mV")
    return figure
