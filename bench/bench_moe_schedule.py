"""The expert scheduler: regret to the optimum, planning time, speed-up over a fixed mapping."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from quernstone import _core
from quernstone.bench import figures_moe
from quernstone.bench.cases.moe import (
    MACHINE,
    MODELS,
    REGIMES,
    Model,
    Phase,
    Regime,
    Source,
    constants_of,
    model_layers,
)
from quernstone.bench.harness import Measure, WrongResult, rows
from quernstone.bench.rows import Spread
from quernstone.moe import Layer, Policy, reference_schedule, schedule_layer
from quernstone.moe.simulate import plan_layer

INSTANCES = 1000
OTHERS: tuple[Policy, ...] = ("fixed", "gpu_only", "cpu_only", "fiddler", "list", "event")
# Layers that are small enough for the reference's enumeration are compared with it before a row
# counts: so many of them, of so many experts at most.
CHECKED, CHECKED_EXPERTS = 10, 8
CALLS = 1000
MICRO = 1e6


def _makespans(layers: list[Layer], policy: Policy) -> np.ndarray:
    return np.array([schedule_layer(layer, policy).makespan for layer in layers])


def _optimum(layers: list[Layer]) -> np.ndarray:
    found = _makespans(layers, "exact")
    small = [i for i, layer in enumerate(layers) if len(layer) <= CHECKED_EXPERTS][:CHECKED]
    for i in small:
        want = reference_schedule.schedule_layer(layers[i], "exact").makespan
        if not np.isclose(found[i], want, rtol=1e-12, atol=0.0):
            raise WrongResult(f"layer {i}: optimum {found[i]}, by enumeration {want}")
    return found


@functools.lru_cache(maxsize=2)
def _regrets(regime: Regime) -> dict[Policy, np.ndarray]:
    layers = regime.layers(INSTANCES)
    optimum = _optimum(layers)
    return {policy: _makespans(layers, policy) / optimum - 1 for policy in ("hybrid", *OTHERS)}


@dataclass(frozen=True)
class Regret:
    """One regime, told by the mean or the worst of its layers."""

    regime: Regime
    summary: str
    quick: bool = False
    threads: int = 1

    @property
    def id(self) -> str:
        return f"moe.schedule.regret.{self.regime.name}.{self.summary}"


@rows(*(Regret(regime, summary) for regime in REGIMES for summary in ("mean", "worst")))
def bench_regret(case: Regret, measure: Measure) -> None:
    regime = case.regime
    summarise = np.mean if case.summary == "mean" else np.max
    others = _regrets(regime)
    measure.value(
        what=f"makespan over the optimum, less 1: {case.summary} of {INSTANCES} layers, "
        f"{regime.name}",
        unit="relative",
        kind="simulated",
        compute=lambda: float(summarise(_regrets(regime)["hybrid"])),
        rivals={policy: float(summarise(others[policy])) for policy in OTHERS},
        notes=[
            f"{regime.experts} experts, {regime.hit:.0%} cached; ms: CPU {regime.cpu_per_token:g} "
            f"a token, transfer {regime.transfer:g}"
        ],
    )


@dataclass(frozen=True)
class Planning:
    """Time to schedule one layer of a regime, in C++."""

    name: str
    regime: Regime
    quick: bool = True
    threads: int = 1

    @property
    def id(self) -> str:
        return f"moe.schedule.planning.{self.name}"


_BY_NAME = {regime.name: regime for regime in REGIMES}


@rows(
    Planning("active8", _BY_NAME["decode8.hit25"]),
    Planning("active64", _BY_NAME["prefill64.hit25"]),
    Planning("active64.mixed", _BY_NAME["mixed64.hit50"]),
)
def bench_planning(case: Planning, measure: Measure) -> None:
    layers = case.regime.layers(21 if measure.quick else 101)

    def seconds() -> Spread:
        times = []
        for layer in layers:
            arguments = (*layer.columns, layer.starts, "hybrid")
            _core.moe.seconds_to_schedule(*arguments, CALLS // 10)
            times.append(_core.moe.seconds_to_schedule(*arguments, CALLS))
        return Spread.of(times).scaled(MICRO)

    measure.value(
        what=f"schedule of one layer, {case.regime.experts} active experts, {case.regime.name}",
        unit="us",
        compute=seconds,
        notes=[f"median over {len(layers)} layers, {CALLS} calls of each in C++"],
    )


@dataclass(frozen=True)
class SpeedUp:
    """A model's layers under one set of constants, at one share of cached experts."""

    model: Model
    source: Source
    phase: Phase
    percent: int
    threads: int = 1

    @property
    def id(self) -> str:
        where = f"{self.model.name}.{self.phase}.cache{self.percent}"
        return f"moe.schedule.speedup.{where}.{self.source}"

    @property
    def quick(self) -> bool:
        return self.source == "published" and self.percent == 25


SPEED_UPS = [
    SpeedUp(model, source, phase, percent)
    for source in ("published", "repository")
    for model in MODELS
    for phase in ("decode", "prefill")
    for percent in (25, 50, 75)
]


FIGURED = next(
    case
    for case in SPEED_UPS
    if (case.model.name, case.source, case.phase, case.percent)
    == ("deepseek-v2-lite", "published", "decode", 25)
)


@rows(*SPEED_UPS)
def bench_speed_up(case: SpeedUp, measure: Measure) -> None:
    """Of the experts alone; attention and the rest of a layer would make it smaller."""
    layers = list(model_layers(case.model, case.source, case.phase, case.percent / 100))
    fixed = _makespans(layers, "fixed").sum()
    others = {"optimum": float(fixed / _optimum(layers).sum())}
    for policy in ("list", "event", "fiddler", "gpu_only", "cpu_only"):
        others[policy] = float(fixed / _makespans(layers, policy).sum())
    measure.value(
        what=f"{case.model.name}, {case.phase}, {case.percent} % cached: time of the fixed mapping "
        f"over ours, {case.source} constants",
        unit="x",
        kind="simulated",
        compute=lambda: float(fixed / _makespans(layers, "hybrid").sum()),
        rivals=others,
        smaller_is_better=False,
        notes=constants_of(case.model, case.source),
    )
    if case == FIGURED:
        layer = next(layer for layer in layers if 2 <= np.isfinite(layer.ready).sum() <= 3)
        plans = [
            plan_layer(layer, policy, f"{case.model.name}, one token: {policy}", unit="ms")
            for policy in ("fixed", "event", "hybrid")
        ]
        until = max(plan.makespan for plan in plans)
        charts = "".join(plan.svg(until=until, kinds=("compute", "transfer")) for plan in plans)
        charts = f"<div>{charts}</div>"
        measure.panel(
            "A layer over CPU, bus and GPU",
            charts,
            f"One decoded token; {MACHINE.name} by its makers' and assumed figures; simulated.",
        )
        measure.panel(
            "Where scheduling pays",
            figures_moe.ratio_map(),
            "Eight active experts of one token, twelve of a prompt, a quarter of them cached. "
            "Dots: Mixtral's experts on published machines. What a schedule gains over a fixed "
            "mapping is a property of the ratios.",
        )
