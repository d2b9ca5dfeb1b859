"""The picture of a `HeadReport`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from quernstone.attention.report import HeadReport

# Of the palette of Okabe and Ito, told apart with any colour vision.
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def draw(report: HeadReport) -> Figure:
    """Heat map layer x head, CV of each layer beside it, the ablation below."""
    layers, heads = report.importance.shape
    rows = [max(2.4, 0.16 * layers)] + ([] if report.ablation is None else [2.2])
    figure = Figure(figsize=(max(6.4, 2.6 + 0.3 * heads), sum(rows) + 1.2), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[3.2, 1], height_ratios=rows)

    heat = figure.add_subplot(grid[0, 0])
    image = heat.imshow(
        report.importance, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="none"
    )
    figure.colorbar(image, ax=heat, label="importance (mean gate)", pad=0.02)
    gates = " and ".join(sorted(set(report.kinds)))
    heat.set(
        title=f"{gates} gate; {report.sink_rate:.0%} of the heads rest on the first token",
        xlabel="head",
        ylabel="layer",
    )
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    heat.yaxis.set_major_locator(MaxNLocator(integer=True))

    cv = figure.add_subplot(grid[0, 1])
    cv.barh(np.arange(layers), report.cv, color=_BLUE)
    cv.set(title=f"mean {report.cv.mean():.2f}", xlabel="CV over heads", ylim=heat.get_ylim())
    cv.tick_params(labelleft=False)

    ablation = report.ablation
    if ablation is not None:
        axis = figure.add_subplot(grid[1, :])
        percent = [0.0, *(100 * share for share in ablation.shares)]
        axis.plot(percent, [0.0, *ablation.random], "s--", color=_ORANGE, label="random heads")
        axis.plot(
            percent, [0.0, *ablation.least_important], "o-", color=_BLUE, label="least important"
        )
        axis.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(
            title=f"loss {ablation.loss:.2f} nats per token with all heads",
            xlabel="heads set to zero (%)",
            ylabel="increase (nats)",
        )
        axis.legend(frameon=False)
    return figure
