"""Hamming rates of real networks: as they are, and cut at equal fidelity without training."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quernstone.bench import figures_pim
from quernstone.bench.cases.pim_networks import NETWORKS, Network, deviation, table
from quernstone.bench.fidelity import layer_snr
from quernstone.bench.harness import Absent, Measure, rows
from quernstone.bench.optional import GET_MODELS
from quernstone.pim.network import Candidates, Compressed, calibrate


@functools.lru_cache(maxsize=1)
def tried(name: str) -> Candidates:
    network = NETWORKS[name]
    graph = network.load()
    return Candidates(graph, calibrate(graph, network.inputs("calibration")))


@functools.cache
def compressed(name: str) -> tuple[Compressed, float]:
    """The network at its operating point, and the seconds that it took."""
    begin = time.perf_counter()
    found = tried(name).choose(NETWORKS[name].snr)
    return found, time.perf_counter() - begin


@dataclass(frozen=True)
class NetworkCase:
    what: str
    network: Network
    threads: int = 2

    @property
    def quick(self) -> bool:
        return self.network.quick

    @property
    def id(self) -> str:
        return f"pim.{self.what}.{self.network.name}"


def _cases(what: str, *names: str) -> list[NetworkCase]:
    return [NetworkCase(what, NETWORKS[name]) for name in names or NETWORKS]


def _present(case: NetworkCase, measure: Measure, what: str, unit: str) -> None:
    """Leaves the row out where the package of weights is missing."""
    try:
        case.network.load()
    except ImportError as error:
        measure.absent(
            what=what, unit=unit, missing=Absent(case.network.name, f"{error}; {GET_MODELS}")
        )


def _value(case: NetworkCase, measure: Measure, what: str, unit: str, compute: Callable[[], float],
           notes: Callable[[], list[str]] = list) -> None:  # fmt: skip
    _present(case, measure, what, unit)
    row = measure.value(what=what, unit=unit, compute=compute)
    row.notes += notes()


@rows(*_cases("table", *(name for name, of in NETWORKS.items() if of.recorded)))
def bench_table(case: NetworkCase, measure: Measure) -> None:
    """Rates of the weights as they are, beside those recorded earlier by other code."""
    name = case.network.name

    def notes() -> list[str]:
        found = table(name)
        shifts = ", ".join(f"shift {s} {rate:.4f}" for s, (rate, _) in found.same_shift.items())
        return [
            f"{found.weights:,} weights: HR {found.hamming_rate:.4f}, {shifts}, "
            f"4 bits {found.four_bits:.4f}; each layer's best shift {found.best_shift:.4f}"
        ]

    _value(
        case, measure, "Hamming rates of the weights: largest distance from the recorded", "HR",
        lambda: deviation(name), notes,
    )  # fmt: skip


@rows(*_cases("cut"))
def bench_cut(case: NetworkCase, measure: Measure) -> None:
    """Ones that are gone, at the operating point of `kept`."""
    name = case.network.name

    def notes() -> list[str]:
        found, seconds = compressed(name)
        return [
            f"HR {found.hamming_rate_before:.4f} of the nearest integers, "
            f"{found.hamming_rate:.4f} now; {found.snr:.1f} dB on calibration inputs",
            f"rounded in {seconds:.0f} s after the candidates were tried",
        ]

    _value(
        case, measure, "ones cut, int8 per channel, without training", "%",
        lambda: 100 * compressed(name)[0].cut, notes,
    )  # fmt: skip
    if case.quick:
        found = compressed(name)[0]
        measure.panel(
            "Hamming rate, layer by layer",
            figures_pim.layers({name: found.layers}),
            f"{name}: every weight of the network at its nearest integer, and rounded to few ones.",
        )


@rows(*_cases("snr"))
def bench_snr(case: NetworkCase, measure: Measure) -> None:
    """The mean over layers of each layer's own error on inputs that rounding has not seen."""
    found: dict[str, float] = {}

    def compute() -> float:
        network = compressed(case.network.name)[0]
        found.update(layer_snr(network.int8, network.network, case.network.inputs("held-out")))
        return float(np.mean(list(found.values())))

    _value(
        case, measure, "output of a layer against int8, held-out inputs, mean over layers", "dB",
        compute, lambda: [f"least of a layer {min(found.values()):.1f} dB"],
    )  # fmt: skip


@rows(*_cases("kept"))
def bench_kept(case: NetworkCase, measure: Measure) -> None:
    """What a user would notice, on inputs that rounding has not seen."""
    of = case.network

    def compute() -> float:
        network = compressed(of.name)[0]
        return of.kept(network.int8, network.network)

    _value(case, measure, of.what, of.unit, compute)
