"""Figures of the expert benchmarks, as <svg> elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from quernstone.bench.plots import INK, SOFT, STYLE, svg
from quernstone.moe import MODELS, PRESETS, CostModel, ExpertsShape, Layer, Trace, replay
from quernstone.moe import schedule_layer as schedule
from quernstone.moe.cache.policies import POLICIES

# Of the palette of Okabe and Ito; the bound is ink.
_COLOURS = ("#626872", "#9aa0a8", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#0f6b6b", INK)
_NAMES = {"s3fifo": "S3-FIFO", "reuse": "ExpectedReuse", "belady": "Belady's bound"}


def hit_curves(traces: dict[str, Trace]) -> str:
    """Hit rate by the share of the experts cached, a panel for each model, a line each policy."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.1 * len(traces), 3.2), layout="constrained")
        panels: Any = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
        for axes, (name, trace) in zip(panels, traces.items(), strict=True):
            slots = sorted({max(1, round(trace.experts * s / 16)) for s in range(1, 16)})
            for policy, colour in zip(POLICIES, _COLOURS, strict=True):
                rate = replay(trace, policy, slots).rate
                label = _NAMES.get(policy, policy.upper())
                wide = 1.8 if policy in ("reuse", "belady") else 1.1
                share = [100 * s / trace.experts for s in slots]
                axes.plot(share, 100 * rate, color=colour, linewidth=wide, label=label)
            axes.set_title(name, fontsize=10, color=INK)
            axes.set_xlabel("experts cached, %")
        panels[0].set_ylabel("hit rate, %")
        panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
        return svg(figure, "moe-hits")


_SIDE = 13
_TRIED = 24


def ratio_map() -> str:
    """What a schedule gains and loses, by CPU and GPU time of an expert over that of its transfer.

    Left, eight active experts of one token; right, twelve of a prompt, whose loads are skewed; a
    quarter of them cached. Dots are published machines with Mixtral's experts.
    """
    across = 2.0 ** np.linspace(-3, 5, _SIDE)
    up = 2.0 ** np.linspace(-7, 1, _SIDE)
    random = np.random.default_rng(0)
    cached = random.random((_TRIED, 12)) < 0.25
    loads = 1 + np.minimum(random.pareto(0.8, (_TRIED, 12)), 63).astype(np.int64)
    gain = np.empty((_SIDE, _SIDE))
    regret = np.empty((_SIDE, _SIDE))
    for row, gpu in enumerate(up):
        for column, cpu in enumerate(across):
            decode = [Layer([1] * 8, ready[:8], [cpu] * 8, gpu, 1.0) for ready in cached]
            prompt = [
                Layer(load, ready, cpu * load, gpu, 1.0)
                for load, ready in zip(loads, cached, strict=True)
            ]
            gain[row, column] = _total(decode, "fixed") / _total(decode, "exact")
            best = _total(prompt, "exact")
            regret[row, column] = 100 * (_total(prompt, "event") / best - 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        panels: Any = figure.subplots(1, 2, sharey=True)
        for axes, values, title, most in (
            (panels[0], gain, "one token: fixed mapping over the optimum", 3.0),
            (panels[1], regret, "prompt: regret of the event simulation, %", 10.0),
        ):
            mesh = axes.pcolormesh(
                across, up, values, cmap="cividis", vmin=values.min(), vmax=min(most, values.max())
            )
            figure.colorbar(mesh, ax=axes, extend="max" if values.max() > most else "neither")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_xlabel("CPU time of a token / transfer")
            for machine, (x, y) in _published().items():
                axes.plot(x, y, "o", color="white", markeredgecolor=INK, markersize=5)
                axes.annotate(
                    machine, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7,
                    color="white",
                )  # fmt: skip
        panels[0].set_ylabel("GPU time / transfer", color=SOFT)
        return svg(figure, "moe-ratios")


def _total(layers: Sequence[Layer], policy: Any) -> float:
    return sum(schedule(layer, policy).makespan for layer in layers)


def _published() -> dict[str, tuple[float, float]]:
    """(CPU, GPU) over transfer of Mixtral's experts on each machine: nearly those of all models."""
    of = MODELS["mixtral-8x7b"]
    shape = ExpertsShape(of.experts, of.hidden, of.intermediate)
    found = {}
    for name, machine in PRESETS.items():
        costs = CostModel.of_machine(machine, shape)
        found[name] = (
            float(costs.cpu_seconds(1)) / costs.transfer,
            float(costs.gpu(1)) / costs.transfer,
        )
    return found
