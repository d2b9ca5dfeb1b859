"""Figures of a chip of macros, as <svg> elements. All of it is simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from quernstone.bench.plots import INK, LINE, OURS, SOFT, STYLE, svg
from quernstone.pim.analysis import Report
from quernstone.pim.grid_chip import chip_response
from quernstone.pim.sensitivity import PUBLISHED, Change, Headline
from quernstone.pim.system import worst_currents

_AMBER = "#d08a1d"
_STEPS = (
    ("int8", "int8"),
    ("lhr", "+ rounding"),
    ("lhr+wds", "+ shift"),
    ("booster", "int8 + booster"),
    ("booster+mapping", "+ mapping"),
    ("all", "all"),
)
# Steps that build on each other are joined: what the weights do, what the supply does, and both.
_LADDERS = ((0, 3), (3, 5), (5, 6))


def waterfall(reports: Mapping[str, Report]) -> str:
    """Worst drop, operations a J and operations a s by technique, a line for each network."""
    titles = ("worst drop, mV", "operations a J, over int8", "operations a s, over int8")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.3), layout="constrained")
        panels: Any = figure.subplots(1, 3)
        for (network, report), colour in zip(
            reports.items(), (OURS, _AMBER, "#56b4e9", "#cc79a7", "#009e73"), strict=False
        ):
            rows = {row[0]: row for row in report.rows()}
            for place, axes in enumerate(panels, start=1):
                values = [rows[name][place] for name, _ in _STEPS]
                for begin, end in _LADDERS:
                    axes.plot(range(begin, end), values[begin:end], "o-", color=colour,
                              markersize=4, linewidth=1.2,
                              label=network if begin == 0 else None)  # fmt: skip
        signoff = next(iter(reports.values())).chip.value("signoff.drop", "mV")
        panels[0].axhline(signoff, color=INK, linewidth=0.8, linestyle=":")
        panels[0].annotate("sign-off", (0, signoff), xytext=(0, 3), textcoords="offset points",
                           fontsize=8, color=SOFT)  # fmt: skip
        panels[0].set_ylim(0, 1.1 * signoff)
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_xticks(range(len(_STEPS)), [label for _, label in _STEPS], rotation=40,
                            ha="right", fontsize=8)  # fmt: skip
            axes.grid(axis="y", color=LINE, linewidth=0.6)
        panels[1].legend(frameon=False, fontsize=8)
        return svg(figure, "pim-waterfall")


def drop_maps(report: Report) -> str:
    """The grid when every cell toggles, and in the worst cycle of the network before and after."""
    chip = report.chip
    response = chip_response(chip)
    between = response.between_macros()
    full = np.full(len(between), chip.value("macro.power", "W") / chip.value("supply.voltage", "V"))
    currents = {
        "every cell toggles": full,
        "int8, its worst cycle": worst_currents(report.traces["int8"], chip, between),
        "few ones, shifted": worst_currents(report.traces["lhr+wds"], chip, between),
    }
    return _maps({name: 1e3 * response.drop(x) for name, x in currents.items()})


def _maps(drops: Mapping[str, NDArray[np.float64]]) -> str:
    side = int(len(next(iter(drops.values()))) ** 0.5)
    most = max(float(x.max()) for x in drops.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(8.8, 3.0), layout="constrained")
        panels: Any = figure.subplots(1, len(drops))
        for axes, (name, x) in zip(panels, drops.items(), strict=True):
            image = axes.imshow(x[: side * side].reshape(side, side), cmap="inferno_r", vmin=0,
                                vmax=most)  # fmt: skip
            axes.set_title(f"{name}: {x.max():.0f} mV", fontsize=9, color=INK)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(image, ax=list(panels), label="drop, mV", shrink=0.85)
        return svg(figure, "pim-drops")


def timeline(report: Report, groups: int = 6) -> str:
    """Levels of the first groups over time, in the round with the most failures."""
    rounds = report.low_power["all"].rounds
    chosen = max(rounds, key=lambda one: int(one.failures.sum()))
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.55 * groups), layout="constrained")
        axes: Any = figure.subplots()
        levels = chosen.table.levels
        shown = min(groups, len(chosen.seconds))
        for g in range(shown):
            for edge in (0.0, 0.8):
                axes.axhline(shown - 1 - g + edge, color=LINE, linewidth=0.6)
            changes = [c for c in chosen.changes if c.group == g]
            times = [0.0, *(1e6 * c.seconds for c in changes)]
            height = [levels[int(chosen.first[g])], *(levels[c.level] for c in changes)]
            axes.step(times, [shown - 1 - g + 0.8 * h for h in height], where="post",
                      color=OURS, linewidth=1.1)  # fmt: skip
            failed = [1e6 * c.seconds for c in changes if c.event == "failure"]
            axes.plot(failed, [shown - 1 - g] * len(failed), "|", color=_AMBER, markersize=7)
        axes.set_yticks([shown - 1 - g + 0.4 for g in range(shown)],
                        [f"group {g}" for g in range(shown)])  # fmt: skip
        axes.set_ylim(-0.15, shown - 0.05)
        axes.set_xlabel("time, us")
        axes.set_title("level of toggle rate that each group is set for, from 0 to 100 % between "
                       "its lines; marks are failures", fontsize=10, color=INK)  # fmt: skip
        return svg(figure, "pim-timeline")


def tornado(base: Headline, changes: Sequence[Change]) -> str:
    """How far the three headline figures move when one assumed figure is halved or doubled, those
    that move them the most first."""
    reach: dict[str, float] = {}
    for change in changes:
        moved = [0.0]
        if change.headline is not None:
            moved = [abs(a / b - 1) for a, b in zip(change.headline, base, strict=True) if b]
        reach[change.figure] = max(reach.get(change.figure, 0.0), *moved)
    names = sorted(reach, key=lambda name: -reach[name])
    titles = (
        "drop taken away, of sign-off",
        "operations a J, over int8",
        "operations a s, over int8",
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.2 + 0.28 * len(names)), layout="constrained")
        panels: Any = figure.subplots(1, 3, sharey=True)
        for which, (axes, title) in enumerate(zip(panels, titles, strict=True)):
            for place, name in enumerate(names):
                for change in changes:
                    if change.figure != name or change.headline is None:
                        continue
                    colour = OURS if change.factor > 1 else _AMBER
                    axes.barh(place, change.headline[which] - base[which], left=base[which],
                              height=0.62, color=colour, alpha=0.85)  # fmt: skip
            axes.axvline(base[which], color=INK, linewidth=0.9)
            axes.axvline(PUBLISHED[which], color=SOFT, linewidth=0.9, linestyle=":")
            axes.set_title(title, fontsize=10, color=INK)
            axes.tick_params(axis="x", labelsize=8)
        panels[0].set_yticks(range(len(names)), names, fontsize=8)
        panels[0].invert_yaxis()
        figure.legend(
            [
                *(Patch(color=colour, alpha=0.85) for colour in (_AMBER, OURS)),
                Line2D([], [], color=SOFT, linewidth=0.9, linestyle=":"),
            ],
            ["halved", "doubled", "published"],
            loc="outside lower center", ncols=3, frameon=False, fontsize=8,
        )  # fmt: skip
        return svg(figure, "pim-tornado")
