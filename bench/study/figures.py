"""Figures of the study, drawn from its summary: each a matplotlib figure, or None without its rows.

Colours as in the other figures of the page: without the loss in orange, with it in green.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quernstone.bench.plots import LINE, OURS, SOFT, STYLE, THREADS

Found = Mapping[str, Any]
COLORS = {"plain": THREADS[1], "balance": OURS, "shared": "#7a5195", "before": SOFT}
LABELS = {
    "plain": "without the loss",
    "balance": "balance loss",
    "shared": "balance loss, shared heads",
    "before": "before",
}


def importance(summary: Found) -> Figure | None:
    """Heat maps [layer, head] of one run of each kind of tinylm, without and with the loss."""
    kinds = {
        kind: found
        for kind, found in summary["kinds"].items()
        if "plain" in found and "balance" in found
    }
    if not kinds:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.0 + 1.45 * len(kinds)), layout="constrained")
        grid = figure.subplots(len(kinds), 2, squeeze=False, sharex=True, sharey=True)
        image = None
        for row, (kind, found) in zip(grid, kinds.items(), strict=True):
            for axis, loss in zip(row, ("plain", "balance"), strict=True):
                image = _heat(axis, found[loss]["importance"])
                axis.set_title(f"{kind}, {LABELS[loss]}", fontsize=9.5, color=SOFT)
        for axis in grid[-1]:
            axis.set_xlabel("head")
        for axis in grid[:, 0]:
            axis.set_ylabel("layer")
        figure.colorbar(image, ax=grid, label="importance (mean gate)", pad=0.02)
    return figure


def smollm2_importance(summary: Found) -> Figure | None:
    """Heat maps [layer, head] of SmolLM2-135M before and after each fine-tuning."""
    runs = summary["smollm2"]
    if len(runs) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        grid = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        image = None
        for axis, (name, run) in zip(grid, runs.items(), strict=True):
            image = _heat(axis, run["importance"])
            title = {"plain": "plain loss", "shared": "balance,\nshared heads"}.get(name)
            axis.set_title(title or LABELS[name], fontsize=9.5, color=SOFT)
            axis.set_xlabel(f"head\nCV {run['cv']:.3f}")
        grid[0].set_ylabel("layer")
        figure.colorbar(image, ax=grid, label="importance (mean gate)", pad=0.02)
    return figure


def _heat(axis: Any, table: Sequence[Sequence[float]]) -> Any:
    image = axis.imshow(
        np.array(table), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="none"
    )
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(integer=True))
    return image


def cv_curves(summary: Found) -> Figure | None:
    """CV over training: mean over seeds, shaded by one standard deviation."""
    kinds = summary["kinds"]
    if not kinds:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, (kind, found) in zip(axes, kinds.items(), strict=True):
            for loss in ("plain", "balance"):
                if loss in found:
                    _curve(axis, found[loss], loss)
            axis.set_title(kind, fontsize=9.5, color=SOFT)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("training step")
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.grid(color=LINE, linewidth=0.6)
            axis.set_axisbelow(True)
        axes[0].set_ylabel("CV of importance over heads")
        axes[-1].legend(frameon=False, fontsize=8.5, labelcolor=SOFT)
    return figure


def _curve(axis: Any, found: Found, loss: str) -> None:
    steps = found["curve"]["step"]
    mean = np.array(found["curve"]["cv"]["mean"], dtype=float)
    sd = np.nan_to_num(np.array(found["curve"]["cv"]["sd"], dtype=float))
    axis.plot(steps, mean, color=COLORS[loss], linewidth=1.4, label=LABELS[loss])
    axis.fill_between(steps, mean - sd, mean + sd, color=COLORS[loss], alpha=0.2, linewidth=0)


def gates(summary: Found) -> Figure | None:
    """Distribution of the gate over layers, heads and tokens, for each kind and SmolLM2."""
    panels = {
        kind: {loss: found[loss]["gates"] for loss in ("plain", "balance") if loss in found}
        for kind, found in summary["kinds"].items()
    }
    if summary["smollm2"]:
        panels["SmolLM2 (vanilla)"] = {n: run["gates"] for n, run in summary["smollm2"].items()}
    if not panels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for name, shares in curves.items():
                edges = np.linspace(0, 1, len(shares) + 1)
                axis.stairs(shares, edges, color=COLORS[name], linewidth=1.3, label=LABELS[name])
            axis.set_title(title, fontsize=9.5, color=SOFT)
            axis.set_xlabel("gate")
            axis.set_yscale("log")
            axis.set_ylim(1e-4, 1)
            axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes[0].set_ylabel("share of (head, token)")
        _legend_below(figure, axes[-1] if summary["smollm2"] else axes[0])
    return figure


def _legend_below(figure: Figure, axis: Any, columns: int = 4) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=SOFT,
    )


def value_drain(summary: Found) -> Figure | None:
    """Norm of the first token's value over that of the others, by layer, before fine-tuning."""
    before = summary["smollm2"].get("before")
    if before is None:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        axis = figure.add_subplot()
        norm = np.array(before["drain"]["norm"])
        layers = np.arange(len(norm))
        for head in range(norm.shape[1]):
            axis.plot(layers, norm[:, head], "o", color=OURS, markersize=4, alpha=0.8)
        axis.plot(layers, norm.mean(1), color=OURS, linewidth=1.0, alpha=0.6)
        axis.axhline(1, color=SOFT, linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layer of SmolLM2-135M")
        axis.set_ylabel("norm of the first value\n/ mean norm of the others")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y", color=LINE, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure


def ablation(summary: Found) -> Figure | None:
    """What the loss gains when heads are zeroed, the least important first or at random."""
    kinds = {kind: found for kind, found in summary["kinds"].items() if "plain" in found}
    if not kinds:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for axis, (kind, found) in zip(axes, kinds.items(), strict=True):
            for loss in ("plain", "balance"):
                if loss in found:
                    _ablation(axis, found[loss], loss)
            axis.set_title(kind, fontsize=9.5, color=SOFT)
            axis.set_xlabel("heads set to zero (%)")
            axis.grid(axis="y", color=LINE, linewidth=0.6)
            axis.set_axisbelow(True)
        axes[0].set_ylabel("increase of the loss (nats)")
        _legend_below(figure, axes[0], columns=2)
    return figure


def _ablation(axis: Any, found: Found, loss: str) -> None:
    percent = [0.0, *(100 * share for share in found["shares"])]
    orders = (("least_important", "o-", "least important"), ("random", "s--", "at random"))
    for order, line, words in orders:
        axis.plot(
            percent,
            [0.0, *found[order]["mean"]],
            line,
            color=COLORS[loss],
            linewidth=1.2,
            markersize=3.5,
            label=f"{LABELS[loss]}, {words}",
        )
