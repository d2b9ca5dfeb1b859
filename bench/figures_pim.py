"""Figures of the Hamming rates of networks, as <svg> elements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from quernstone.bench.plots import INK, OURS, SOFT, STYLE, svg
from quernstone.pim.network import Layer

# Of the palette of Okabe and Ito.
_COLOURS = ("#0f6b6b", "#d08a1d", "#56b4e9", "#cc79a7", "#009e73", "#626872", INK)


def _name(figure: str, networks: Iterable[str]) -> str:
    """Of a figure of these networks: a page may hold several of one kind."""
    return "-".join((figure, *networks))


def layers(networks: Mapping[str, Sequence[Layer]]) -> str:
    """Hamming rate of every layer before and after, a panel for each network."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.4 * len(networks)), layout="constrained")
        panels: Any = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
        for axes, (name, found) in zip(panels, networks.items(), strict=True):
            at = np.arange(len(found))
            before = [layer.hamming_rate_before for layer in found]
            after = [layer.hamming_rate for layer in found]
            axes.vlines(at, after, before, color="#c9cdc9", linewidth=1.0, zorder=1)
            axes.plot(at, before, "o", color=SOFT, markersize=3.5, label="nearest integers")
            axes.plot(at, after, "o", color=OURS, markersize=3.5, label="rounded to few ones")
            axes.set_title(name, fontsize=10, color=INK)
            axes.set_ylim(0, 0.72)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel("Hamming rate")
        panels[-1].set_xlabel("layer, from input to output")
        panels[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
        return svg(figure, _name("pim-layers", networks))


def frontier(networks: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Ones cut against fidelity: for each network points (dB on held-out inputs, cut, kept).

    The marker is filled where `kept` says that what a user notices is within the promise.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        axes: Any = figure.subplots()
        for (name, points), colour in zip(networks.items(), _COLOURS, strict=False):
            decibels, cut, kept = (np.array(part) for part in zip(*points, strict=True))
            axes.plot(decibels, 100 * cut, "-", color=colour, linewidth=1.3, label=name)
            good = kept > 0
            axes.plot(decibels[good], 100 * cut[good], "o", color=colour, markersize=4.5)
            axes.plot(
                decibels[~good], 100 * cut[~good], "o", color=colour, markersize=4.5,
                markerfacecolor="white",
            )  # fmt: skip
        axes.set_xlabel("output of a layer against int8, held-out inputs, mean over layers, dB")
        axes.set_ylabel("ones cut, %", color=SOFT)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        return svg(figure, _name("pim-frontier", networks))


def toggles(
    network: str,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    rates: tuple[float, float],
) -> str:
    """Rtog of one macro over bit-cycles, with the Hamming rates that bound it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.8), layout="constrained")
        axes: Any = figure.subplots()
        at = np.arange(len(before))
        for values, rate, colour, name in (
            (before, rates[0], SOFT, "nearest integers"),
            (after, rates[1], OURS, "rounded to few ones"),
        ):
            axes.step(at, values, where="mid", color=colour, linewidth=1.1, label=name)
            axes.axhline(rate, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                "HR", (len(before) - 1, rate), xytext=(2, 2), textcoords="offset points",
                fontsize=7.5, color=colour,
            )  # fmt: skip
        axes.set_xlabel("bit-cycle, 8 for a vector of inputs")
        axes.set_ylabel("Rtog", color=SOFT)
        axes.set_ylim(0, 1.15 * max(rates))
        axes.margins(x=0.01)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
        return svg(figure, _name("pim-toggles", (network,)))
