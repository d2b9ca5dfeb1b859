"""Figures of the page, as SVG text that stands alone inside HTML."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quernstone.bench import words
from quernstone.bench.rows import Row

PIXELS_PER_INCH = 108
INK, SOFT, LINE, OURS = "#20242a", "#626872", "#e0e2df", "#0f6b6b"
# Of the palette of Okabe and Ito, told apart with any colour vision.
THREADS = {1: "#d08a1d", 2: OURS}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}


def svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element; `name` makes its ids its own among others on a page.

    It shrinks with the page and never grows far beyond its own size, which would blow its text up.
    """
    out = io.StringIO()
    quiet: Any = {"svg.hashsalt": name, "svg.fonttype": "none"}
    with rc_context(quiet):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    width = PIXELS_PER_INCH * figure.get_figwidth()
    text = text.replace("<svg", f'<svg style="max-width:{width:.0f}px"', 1)
    # Text takes the page's font; matplotlib has laid it out with its own, which is wider.
    text = re.sub(r"font: (?:[a-z]+ )?([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)


def ratios(rows: Sequence[Row]) -> Figure | None:
    """How many times faster ours is, a line of dots per rival, one dot a row."""
    found: dict[str, list[tuple[float, float, float, int]]] = {}
    for row in rows:
        for name, rival in row.rivals.items():
            if rival.ratio and rival.ratio_p20 and rival.ratio_p80:
                entry = (rival.ratio, rival.ratio_p20, rival.ratio_p80, row.threads)
                found.setdefault(name, []).append(entry)
    if not found:
        return None
    names = sorted(found, key=lambda name: max(found[name]))
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 1.15 + 0.42 * len(names)), layout="constrained")
        axis = figure.add_subplot()
        axis.axvline(1, color=INK, linewidth=0.8)
        for place, name in enumerate(names):
            entries = sorted(found[name])
            for index, (ratio, low, high, threads) in enumerate(entries):
                y = place + 0.26 * ((index + 0.5) / len(entries) - 0.5) * 2
                color = THREADS.get(threads, SOFT)
                axis.plot([low, high], [y, y], color=color, linewidth=1.1, alpha=0.55)
                axis.plot(ratio, y, "o", color=color, markersize=4.6, markeredgewidth=0)
        axis.set_xscale("log")
        _plain_ticks(axis, [r for entries in found.values() for e in entries for r in e[1:3]])
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.grid(axis="x", color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("times as fast as the rival")
        _thread_legend(axis, {entry[3] for entries in found.values() for entry in entries})
    return figure


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    low, high = min(0.8, *values), max(1.25, *values)
    steps = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
    ticks = [step for step in steps if low * 0.9 <= step <= high * 1.1]
    while len(ticks) > 8:
        ticks = [tick for tick in ticks if tick == 1 or ticks.index(tick) % 2 == 0]
    axis.set_xlim(low / 1.12, high * 1.12)
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.set_xticks([], minor=True)


def roofline(rows: Sequence[Row], machine_rows: Sequence[Row]) -> Figure | None:
    """Rate over operations per byte, below what the machine's memory and arithmetic allow."""
    points = [
        (row.work["operations"] / row.work["bytes"], _rate(row), row)
        for row in rows
        if row.work.get("operations") and row.work.get("bytes") and _rate(row)
    ]
    if not points:
        return None
    limits = {row.id: row.ours for row in machine_rows if row.ours}
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.5), layout="constrained")
        axis = figure.add_subplot()
        left, right = 0.5, max(x for x, _, _ in points) * 3
        rates = [rate for _, rate, _ in points]
        for threads in sorted({row.threads for _, _, row in points}):
            roof = _own_limit(rows, threads) or limits.get(f"machine.mm.fp32.t{threads}")
            slope = limits.get(f"machine.dram.read.t{threads}")
            _roof(axis, roof, slope, left, right, threads)
            rates += [rate for rate in (roof,) if rate]
        for x, rate, row in points:
            face = THREADS.get(row.threads, SOFT)
            marker = "D" if ".bf16." in row.id else "o"
            axis.plot(x, rate, marker, color=face, markersize=5, markeredgewidth=0, alpha=0.85)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(left, right)
        axis.set_ylim(min(rates) / 6, max(rates) * 1.9)
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.tick_params(which="minor", length=0)
        axis.grid(color=LINE, linewidth=0.6, which="major")
        axis.set_axisbelow(True)
        axis.set_xlabel("useful operations per byte of inputs and output")
        axis.set_ylabel("GF/s")
        _thread_legend(axis, {row.threads for _, _, row in points}, place="lower right")
    return figure


def _own_limit(rows: Sequence[Row], threads: int) -> float | None:
    """The arithmetic limit that was measured in the rounds of the rows themselves."""
    found = [
        row.limit.value
        for row in rows
        if row.limit is not None and row.threads == threads and row.limit.unit == "GF/s"
    ]
    return median(found) if found else None


def _roof(
    axis: Any, roof: float | None, slope: float | None, left: float, right: float, threads: int
) -> None:
    if roof is None:
        return
    color = THREADS.get(threads, SOFT)
    knee = roof / slope if slope else left
    axis.plot([knee, right], [roof, roof], color=color, linewidth=1.3)
    if slope:
        axis.plot([left, knee], [slope * left, roof], color=color, linewidth=1.3, linestyle="--")
    label = f"torch.mm {words.number(roof)} GF/s"
    if slope:
        label += f", DRAM {words.number(slope)} GB/s"
    axis.annotate(
        label,
        (knee, roof),
        xytext=(6, 4),
        textcoords="offset points",
        ha="left",
        color=color,
        fontsize=8,
    )


def _rate(row: Row) -> float:
    seconds = {"s": 1.0, "ms": 1e3, "us": 1e6}.get(row.unit)
    if seconds is None or not row.ours:
        return 0.0
    return row.work["operations"] / (row.ours / seconds) / 1e9


def _thread_legend(axis: Any, threads: set[int], place: str = "lower right") -> None:
    for count in sorted(threads):
        label = f"{count} thread{'s' if count > 1 else ''}"
        axis.plot([], [], "o", color=THREADS.get(count, SOFT), markersize=4.6, label=label)
    axis.legend(frameon=False, fontsize=8.5, loc=place, handletextpad=0.2, labelcolor=SOFT)
