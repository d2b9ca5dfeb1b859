"""Caches, gating and predictions on the routing of trained models."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quernstone.bench import figures_moe
from quernstone.bench.harness import Measure, rows
from quernstone.bench.tinylm import experts as tiny
from quernstone.bench.tinylm.corpus import HELD_OUT
from quernstone.bench.tinylm.model import TinyLm
from quernstone.bench.tinylm.train import shifted
from quernstone.moe import (
    AdaptiveGating,
    layer_sensitivity,
    moe_blocks,
    prediction_accuracy,
    search_threshold,
    threshold_candidates,
)
from quernstone.moe.study import Study, study

NAMES = tuple(tiny.CONFIGS)
PERCENT = (25, 50, 75)


@dataclass(frozen=True)
class CacheCase:
    """Caches of each layer that hold a share of its experts."""

    model: str
    percent: int
    threads: int = 1

    @property
    def id(self) -> str:
        return f"moe.cache.{self.model}.slots{self.percent}"

    @property
    def quick(self) -> bool:
        return self.percent == 25


FIGURED = CacheCase("top2of16", 25)


@functools.cache
def _study(model: str) -> Study:
    trace = tiny.load_trace(model)
    return study(trace, [trace.experts * percent // 100 for percent in PERCENT])


@rows(*(CacheCase(model, percent) for model in NAMES for percent in PERCENT))
def bench_cache(case: CacheCase, measure: Measure) -> None:
    """Ours is ExpectedReuse; the others include the bound, which knows the future."""
    found = _study(case.model)
    slots = tiny.CONFIGS[case.model].experts * case.percent // 100
    closed = {row.policy: row for row in found.rows if row.slots == slots}
    measure.value(
        what=f"{case.model}, decoding, {case.percent} % of the experts cached: share of the way "
        "from LRU's hit rate to the bound that the ExpectedReuse cache goes",
        unit="%",
        kind="simulated",
        compute=lambda: 100 * closed["reuse"].gap_closed,
        rivals={p: 100 * row.gap_closed for p, row in closed.items() if p not in ("reuse", "lru")},
        smaller_is_better=False,
        notes=[
            "hit rates: " + ", ".join(f"{p} {row.hit_rate:.3f}" for p, row in closed.items()),
            f"MRS less LRU {found.mrs_over_lru(slots):+.1f} points; HybriMoE reports +5.0 to +7.8 "
            "at 25 %",
            f"{tiny.trace_path_of(case.model).name}: held-out text, a byte a step",
        ],
    )
    if case == FIGURED:
        measure.panel(
            "Caches of experts",
            figures_moe.hit_curves({name: tiny.load_trace(name) for name in NAMES}),
            "Hit rate of every policy on two trained models, decoding held-out text; simulated.",
        )


SPLITS = 5
TOLERANCE = 0.005
# The search stops a little below, for what another text may differ.
SEARCHED = 0.004
CALIBRATED, VALIDATED = 32, 96


class Gated(NamedTuple):
    single: float
    active: float
    rise: float
    """Relative, of the loss on text that neither calibration nor search has seen."""
    gating: AdaptiveGating


@dataclass(frozen=True)
class GatingCase:
    model: str
    threads: int = 2
    quick: bool = False

    @property
    def id(self) -> str:
        return f"moe.gating.{self.model}"


def nats(model: nn.Module, labels: Tensor) -> float:
    """Mean loss of windows [b, t]."""
    with torch.no_grad():
        parts = [model(shifted(part), part).loss.item() * len(part) for part in labels.split(16)]
    return math.fsum(parts) / len(labels)


def window_loss(model: nn.Module, labels: Tensor) -> Tensor:
    loss: Tensor = model(shifted(labels), labels).loss
    return loss


def gated(model: TinyLm, labels: Tensor, seed: int) -> Gated:
    """Calibrates, searches and measures on three parts of the windows, by a seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sizes = [CALIBRATED, VALIDATED, len(labels) - CALIBRATED - VALIDATED]
    calibration, validation, evaluation = labels[order].split(sizes)
    sensitivity = layer_sensitivity(model, calibration.split(1), window_loss)
    weights = router_weights(model, calibration)
    candidates = threshold_candidates(weights, list(sensitivity.values()), 12)

    def loss(threshold: float) -> float:
        with AdaptiveGating(sensitivity, threshold).on(model):
            return nats(model, validation)

    found = search_threshold(loss, candidates, tolerance=SEARCHED)
    gating = AdaptiveGating(sensitivity, found.threshold)
    with gating.on(model):
        after = nats(model, evaluation)
    use = gating.use()
    return Gated(use.single, use.active, after / nats(model, evaluation) - 1, gating)


def gated_by(model: TinyLm, seed: int) -> Gated:
    """`gated` on the held-out text."""
    return gated(model, _held_out(), seed)


def router_weights(model: nn.Module, labels: Tensor) -> list[Tensor]:
    """Of each block [t, k]: the weights of the chosen experts."""
    found: list[list[Tensor]] = []
    hooks = []
    for block in moe_blocks(model):
        parts: list[Tensor] = []
        found.append(parts)
        hook = block.router.register_forward_hook(
            lambda _module, _inputs, output, parts=parts: parts.append(output[1])
        )
        hooks.append(hook)
    with torch.no_grad():
        for part in labels.split(16):
            model(shifted(part))
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]


def _held_out() -> Tensor:
    return torch.cat(list(tiny.batches(HELD_OUT)))


@rows(*(GatingCase(model) for model in NAMES))
def bench_gating(case: GatingCase, measure: Measure) -> None:
    model, labels = tiny.load(case.model), _held_out()
    top_k = tiny.CONFIGS[case.model].top_k
    runs: list[Gated] = []

    def compute() -> float:
        runs.extend(gated(model, labels, seed) for seed in range(SPLITS))
        return 100 * min(run.single for run in runs)

    row = measure.value(
        what=f"{case.model}: tokens that keep one expert of {top_k}, the fewest of {SPLITS} "
        "splits; error: the largest rise of the loss",
        unit="%",
        kind="measured",
        compute=compute,
        notes=[
            "AdapMoE's 25 % is this share too; its activated experts fall from 2 to 1.74",
        ],
    )
    row.error = max(run.rise for run in runs)
    active = np.mean([run.active for run in runs])
    shares = ", ".join(f"{100 * run.single:.1f} %" for run in runs)
    rises = ", ".join(f"{100 * run.rise:+.2f} %" for run in runs)
    row.notes += [
        f"activated experts {active:.2f} of {top_k}",
        f"by split: single {shares}; loss {rises}",
    ]


@dataclass(frozen=True)
class PredictionCase:
    model: str
    threads: int = 2
    quick: bool = True

    @property
    def id(self) -> str:
        return f"moe.prediction.{self.model}"


@rows(*(PredictionCase(model) for model in NAMES))
def bench_prediction(case: PredictionCase, measure: Measure) -> None:
    model = tiny.load(case.model)
    labels = _held_out()[:64]
    found: list[np.ndarray] = []

    def compute() -> float:
        found.append(
            prediction_accuracy(model, labels.split(16), lambda part: tiny.run(model, part))
        )
        return 100 * float(np.nanmean(found[0][:, 0]))

    row = measure.value(
        what=f"{case.model}: experts predicted by the next layer's router a layer early that are "
        "used",
        unit="%",
        compute=compute,
        notes=["AdapMoE has 57 to 94 %, by layer, for Mixtral-8x7B"],
    )
    means = np.nanmean(found[0], axis=0)
    row.notes.append(
        "one, two, three layers early: " + ", ".join(f"{100 * x:.1f} %" for x in means)
    )
