"""Hamming rates of real networks: as they are, and cut at equal fidelity without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quernstone.bench import figures_pim
from quernstone.bench.cases import pim_networks as cases
from quernstone.bench.cases.pim_networks import NETWORKS, Network, deviation, table
from quernstone.bench.fidelity import layer_snr
from quernstone.bench.harness import Absent, Measure, distance, rows
from quernstone.bench.optional import GET_MODELS
from quernstone.pim import Macro, toggle_rate
from quernstone.pim.network import Compressed, integer_inputs


def pressed(name: str) -> Compressed:
    """The network at its operating point."""
    return cases.compressed(name, NETWORKS[name].snr)


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


# A layer that is as good as unchanged counts as this.
_MOST_DECIBELS = 60.0


def _mean(ratios: dict[str, float]) -> float:
    return float(np.mean([min(ratio, _MOST_DECIBELS) for ratio in ratios.values()]))


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


@rows(*_cases("point"))
def bench_point(case: NetworkCase, measure: Measure) -> None:
    """Chooses the operating point again, with inputs that neither rounding nor `kept` sees."""
    of = case.network

    def notes() -> list[str]:
        snr, kept = cases.operating_point(of.name)
        tried = ", ".join(f"{at:g} dB {value:.4g}" for at, value in sorted(kept.items()))
        return [
            f"chosen {snr:g} dB, in use {of.snr:g} dB; enough: {of.wanted:g} {of.unit} kept of "
            "validation inputs, three quarters of the loss that is promised at most",
            f"looked at: {tried}",
        ]

    _value(
        case, measure, "operating point: distance of the one in use from that of validation inputs",
        "dB", lambda: distance(cases.operating_point(of.name).snr, of.snr), notes,
    )  # fmt: skip


@rows(*_cases("cut"))
def bench_cut(case: NetworkCase, measure: Measure) -> None:
    """Ones that are gone, at the operating point of `kept`."""
    name = case.network.name

    def notes() -> list[str]:
        found = pressed(name)
        return [
            f"at {case.network.snr:g} dB, which `pim.point.{name}` takes with validation inputs",
            f"HR {found.hamming_rate_before:.4f} of the nearest integers, "
            f"{found.hamming_rate:.4f} now; {found.snr:.1f} dB on calibration inputs",
        ]

    _value(
        case, measure, "ones cut, int8 per channel, without training", "%",
        lambda: 100 * pressed(name).cut, notes,
    )  # fmt: skip
    if case.quick or name == "minilm":
        measure.panel(
            f"Hamming rate of {name}, layer by layer",
            figures_pim.layers({name: pressed(name).layers}),
            "Every layer with its weights at the nearest integers of 8 bits, and rounded to few "
            "ones at the operating point of this row.",
        )


VECTORS = 16


@rows(*_cases("toggles", "classifier", "minilm"))
def bench_toggles(case: NetworkCase, measure: Measure) -> None:
    """Toggles of the widest layer on real inputs of 8 bits, the lowest bit first."""
    name = case.network.name
    found: dict[str, object] = {}

    def compute() -> float:
        network = pressed(name)
        weight = max(
            (codes.weight for codes in network.codes.values() if codes.weight.groups == 1),
            key=lambda weight: weight.size,
        )
        inputs = integer_inputs(network.int8, case.network.inputs("held-out")[0], weight, VECTORS)
        macro = Macro(rows=inputs.shape[1], banks=weight.shape[0])
        rates = []
        for codes in (network.nearest, network.codes):
            stored = codes[weight.constant].stored.reshape(weight.shape[0], -1)
            rates.append(toggle_rate(stored, inputs, macro, "macro")[0, :, 0])
        found.update(
            name=weight.name, rates=rates,
            bounds=(
                network.nearest[weight.constant].hamming_rate,
                network.codes[weight.constant].hamming_rate,
            ),
        )  # fmt: skip
        return 100 * (1 - float(rates[1].mean() / rates[0].mean()))

    _value(
        case, measure, "toggles cut in the widest layer, real inputs of 8 bits", "%", compute,
        lambda: [f"{found['name']}, {VECTORS} vectors of held-out inputs, lowest bit first"],
    )  # fmt: skip
    before, after = found["rates"]  # type: ignore[misc]
    measure.panel(
        f"Rtog of {name}, {found['name']}",
        figures_pim.toggles(name, before, after, found["bounds"]),  # type: ignore[arg-type]
        f"Share of cell products that toggle in each cycle, {VECTORS} vectors of held-out inputs "
        "one bit after the other; dashed the Hamming rates, which no input exceeds.",
    )


@rows(*_cases("frontier", "classifier", "minilm"))
def bench_frontier(case: NetworkCase, measure: Measure) -> None:
    """Ones cut where every layer's output is at 30 dB on average, on calibration inputs."""
    name = case.network.name

    def compute() -> float:
        return 100 * cases.compressed(name, 30.0).cut

    _value(case, measure, "ones cut at 30 dB, the same for every network", "%", compute)
    points = []
    for snr in (24.0, 28.0, 32.0, 36.0, 40.0, 44.0):
        network = cases.compressed(name, snr)
        ratios = layer_snr(network.int8, network.network, case.network.inputs("held-out"))
        kept = case.network.kept(network.int8, network.network, "held-out")
        points.append((_mean(ratios), network.cut, kept >= case.network.least))
    measure.panel(
        f"Ones against fidelity, {name}",
        figures_pim.frontier({name: points}),
        "Each point is one choice of every layer's shift, scale and price of a one; filled where "
        "the network still does what is promised.",
    )


@rows(*_cases("snr"))
def bench_snr(case: NetworkCase, measure: Measure) -> None:
    """The mean over layers of each layer's own error on inputs that rounding has not seen."""
    found: dict[str, float] = {}

    def compute() -> float:
        network = pressed(case.network.name)
        found.update(layer_snr(network.int8, network.network, case.network.inputs("held-out")))
        return _mean(found)

    _value(
        case, measure, "output of a layer against int8, held-out inputs, mean over layers", "dB",
        compute, lambda: [f"least of a layer {min(found.values()):.1f} dB"],
    )  # fmt: skip


@rows(*_cases("kept"))
def bench_kept(case: NetworkCase, measure: Measure) -> None:
    """What a user would notice, on inputs that rounding has not seen."""
    of = case.network

    def compute() -> float:
        network = pressed(of.name)
        return of.kept(network.int8, network.network, "held-out")

    _value(case, measure, of.what, of.unit, compute)
