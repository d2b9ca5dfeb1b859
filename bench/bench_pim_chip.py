"""A chip of macros: its mapper beside the optimum, and networks through AIM's techniques on it.

What a chip takes is simulated; its figures are mostly assumed, see `quernstone.pim.chip`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from quernstone.bench import figures_pim_chip as figures
from quernstone.bench.cases.pim_chip import CHIP, ON_CHIP, Problem, report, small_problems
from quernstone.bench.harness import Measure, WrongResult, rows
from quernstone.bench.rows import Spread
from quernstone.pim.mapper import Objective, map_exact, map_tasks, mapping_cost
from quernstone.pim.sensitivity import PUBLISHED, sweep

MOVES = 200_000


@dataclass(frozen=True)
class ExactCase:
    objective: Objective
    quick: bool = False
    threads: int = 1

    @property
    def id(self) -> str:
        return f"pim.mapper.regret.{self.objective}"


@rows(ExactCase("energy"), ExactCase("latency"))
def bench_regret(case: ExactCase, measure: Measure) -> None:
    """The worst of twenty problems of ten tasks."""

    def worst() -> float:
        found = 0.0
        for problem in small_problems(case.objective):
            arguments = problem.arguments()
            best = map_exact(**arguments)
            if mapping_cost(best.group, **arguments) != best.cost:
                raise WrongResult(f"{problem}: the cost of the optimum is not that of its mapping")
            found = max(found, map_tasks(**arguments, moves=20_000).cost / best.cost - 1)
        return found

    measure.value(
        what=f"mapper, {case.objective}: annealing over the optimum, less 1, worst of 20",
        unit="relative",
        compute=worst,
        kind="measured",
    )


@dataclass(frozen=True)
class TimeCase:
    objective: Objective
    quick: bool = True
    threads: int = 1

    @property
    def id(self) -> str:
        return f"pim.mapper.time.{self.objective}"


@rows(TimeCase("energy"), TimeCase("latency"))
def bench_mapper(case: TimeCase, measure: Measure) -> None:
    arguments = Problem(case.objective, 64, 16, 4, 0).arguments()

    def seconds() -> Spread:
        times = []
        for seed in range(5):
            begin = time.perf_counter()
            map_tasks(**arguments, moves=MOVES, seed=seed)
            times.append(time.perf_counter() - begin)
        return Spread.of(times)

    measure.value(
        what=f"mapper, {case.objective}: 64 tasks on 16 groups of 4, {MOVES:,} exchanges",
        unit="s",
        compute=seconds,
    )


@dataclass(frozen=True)
class ChipCase:
    network: str
    figure: str
    quick: bool = False
    threads: int = 2

    @property
    def id(self) -> str:
        return f"pim.chip.{self.network}.{self.figure}"


_WHAT = {
    "mitigation": ("share of the sign-off's drop that all techniques take away", "share"),
    "efficiency": ("operations a J, over int8 at sign-off, low power", "ratio"),
    "speed_up": ("operations a s, over int8 at sign-off, sprint", "ratio"),
}


@rows(
    *(
        ChipCase(network, figure, quick=network == "classifier")
        for network in ON_CHIP
        for figure in _WHAT
    )
)
def bench_chip(case: ChipCase, measure: Measure) -> None:
    """Beside the headline of the paper, the best of its networks on its chip: not these."""
    found = report(case.network)
    what, unit = _WHAT[case.figure]
    low = found.low_power["all"]
    measure.value(
        what=f"{case.network} on a model of a chip: {what}",
        unit=unit,
        kind="simulated",
        compute=lambda: float(getattr(found.headline, case.figure)),
        rivals={"published": float(getattr(PUBLISHED, case.figure))},
        smaller_is_better=False,
        notes=[
            f"HR {found.hamming['int8']:.3f} to {found.hamming['lhr+wds']:.3f}; "
            f"{1e6 * low.failures / low.cycles:.0f} failures a million cycles; "
            f"{found.share:.0%} of the products in macros",
            "published: arXiv 2511.04321, the best of its networks on a chip after layout",
        ],
    )
    if case.figure == "mitigation" and case.network in ("classifier", "minilm"):
        changes = sweep(found.traces, CHIP, found.shape)
        measure.panel(
            f"{case.network} on a chip of macros, technique by technique",
            figures.waterfall({case.network: found}),
            "Simulated. The chip is a model, not silicon: its figures are mostly assumed.",
        )
        measure.panel(
            "Drops of its grid",
            figures.drop_maps(found),
            "The mesh is scaled so that the worst drop is that of sign-off when every cell toggles.",
        )
        measure.panel(
            "Groups follow their supply",
            figures.timeline(found),
            "Low power, all techniques, the round with the most failures; simulated.",
        )
        measure.panel(
            "What was assumed, halved (amber) and doubled",
            figures.tornado(found.headline, changes),
            "Full lines: the figures as they are; dotted: the paper's abstract.",
        )
