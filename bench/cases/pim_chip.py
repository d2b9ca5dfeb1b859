"""Networks on a chip of macros, and small problems for its mapper."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from quernstone.bench.cases.pim_networks import NETWORKS
from quernstone.pim.analysis import Report, analyze
from quernstone.pim.chip import CHIPS, Mode, VfTable
from quernstone.pim.mapper import Objective

CHIP = CHIPS["aim-7nm-256tops"]
ON_CHIP = ("classifier", "detector", "recogniser", "magika", "minilm")


@functools.lru_cache(maxsize=len(ON_CHIP))
def report(name: str) -> Report:
    """A network on the chip: one input of it runs, all calibration inputs adjust the rounding."""
    network = NETWORKS[name]
    batches = network.inputs("calibration")
    one = {key: x[:1] for key, x in batches[-1].items()}
    return analyze(network.load(), [*batches, one], CHIP, snr=network.snr)


@dataclass(frozen=True)
class Problem:
    """Tasks with the Hamming rates of layers, some of each layer, for the mapper."""

    objective: Objective
    tasks: int
    groups: int
    places: int
    seed: int

    def arguments(self) -> dict[str, Any]:
        random = np.random.default_rng(self.seed)
        mode: Mode = "low-power" if self.objective == "energy" else "sprint"
        return {
            "rates": random.uniform(0.25, 0.6, self.tasks),
            "sets": np.sort(random.integers(0, max(2, self.tasks // 3), self.tasks)),
            "weights": random.uniform(0.5, 2.0, self.tasks),
            "table": VfTable.of_chip(CHIP, mode),
            "groups": self.groups,
            "places": self.places,
            "objective": self.objective,
        }


def small_problems(objective: Literal["energy", "latency"]) -> list[Problem]:
    """Of which the optimum is found by branch and bound."""
    return [Problem(objective, 10, 4, 3, seed) for seed in range(20)]
