"""From a network to volts, joules and seconds: AIM's techniques on a chip that is a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quernstone.importers import Graph
from quernstone.machine import Machine
from quernstone.pim import wds
from quernstone.pim.chip import CHIPS
from quernstone.pim.floorplan import chip_response
from quernstone.pim.layers import Codes
from quernstone.pim.network import Candidates, calibrate
from quernstone.pim.sensitivity import Headline, headline, outcomes
from quernstone.pim.system import Outcome, Trace, network_trace
from quernstone.pim.work import MOST_VECTORS, network_work

VARIANTS = ("int8", "lhr", "wds", "lhr+wds")


@dataclass(frozen=True, eq=False)
class Report:
    """A network on a chip, with and without AIM's techniques; simulated."""

    chip: Machine
    traces: Mapping[str, Trace]
    """By `VARIANTS`."""
    hamming: Mapping[str, float]
    """HR of all weights, by `VARIANTS`."""
    low_power: Mapping[str, Outcome]
    """By `system.TECHNIQUES`."""
    sprint: Mapping[str, Outcome]
    headline: Headline
    share: float
    """Of the network's products, those in macros."""
    shape: NDArray[np.float64]
    """[m, m] the grid's response before it was scaled to the chip."""

    def rows(self) -> list[tuple[str, float, float, float, float, int]]:
        """Of each technique: name, worst drop in mV, operations a J and a s over those of int8 at
        the level of sign-off (in low power, in sprint), failures in low power for a million cycles,
        and those of them beyond the level called safe."""
        low, sprint = self.low_power, self.sprint
        return [
            (
                name,
                1e3 * one.worst_drop,
                one.efficiency / low["int8"].efficiency,
                sprint[name].rate / sprint["int8"].rate,
                1e6 * one.failures / one.cycles,
                one.beyond,
            )
            for name, one in low.items()
        ]


def variants(
    graph: Graph,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    snr: float = 30.0,
    shifts: Sequence[int] | None = None,
) -> dict[str, dict[str, Codes]]:
    """A network's integers: nearest, of few ones, shifted, and both at once.

    Args:
        graph: of the network.
        batches: calibration inputs by name.
        snr: dB, of a layer's output, the mean over the layers, see `compress`.
        shifts: that a layer may have; None: those of `compress`.

    Returns:
        By `VARIANTS`, the integers by the names of the constants. "wds" cuts no weight.
    """
    calibration = calibrate(graph, batches)
    both = Candidates(graph, calibration, shifts=shifts).choose(snr)
    rounded = Candidates(graph, calibration, shifts=(0,)).choose(snr)
    moved = wds.search_shifts(list(both.nearest.values()))
    return {
        "int8": dict(both.nearest),
        "lhr": dict(rounded.codes),
        "wds": dict(zip(both.nearest, moved, strict=True)),
        "lhr+wds": dict(both.codes),
    }


def analyze(
    graph: Graph,
    batches: Sequence[Mapping[str, Tensor]],
    chip: str | Machine = "aim-7nm-256tops",
    *,
    snr: float = 30.0,
    vectors: int = MOST_VECTORS,
    shape: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Report:
    """Takes a network through rounding, shifts, booster and mapping on a chip of macros.

    The last batch is what runs; all of them calibrate. A layer's inputs are quantised to unsigned
    bytes, its weights to signed ones. The chip's grid is scaled so that its worst macro drops by
    the figure of sign-off when every cell toggles.

    Args:
        graph: of `quernstone.importers`.
        batches: inputs by name.
        chip: a name of `CHIPS`, or figures of the same names.
        snr: dB, see `variants`.
        vectors: most consecutive vectors of a layer that are looked at.
        shape: [m, m] response of another grid than `floorplan.chip_response` makes.
        seed: of the mapper.

    Raises:
        ValueError: no batches, an unknown chip, a layer that is not supported, figures that
            contradict each other.

    Source: AIM, arXiv 2511.04321 (our reading: the body of the paper was not at hand).
    """
    if isinstance(chip, str):
        if chip not in CHIPS:
            raise ValueError(f"chip: got {chip!r}, expected one of {', '.join(CHIPS)}")
        chip = CHIPS[chip]
    if not batches:
        raise ValueError("batches: got none, expected at least one")
    return analyze_variants(
        graph, variants(graph, batches, snr=snr), batches[-1], chip,
        vectors=vectors, shape=shape, seed=seed,
    )  # fmt: skip


def analyze_variants(
    graph: Graph,
    codes: Mapping[str, Mapping[str, Codes]],
    inputs: Mapping[str, Tensor],
    chip: Machine,
    *,
    vectors: int = MOST_VECTORS,
    shape: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Report:
    """`analyze` of integers that are there already, as `variants` gives them."""
    response = chip_response(chip) if shape is None else shape
    traces, rates, share = {}, {}, 0.0
    for name in VARIANTS:
        found = codes[name]
        weights = {
            one.weight.node.name: one.stored.astype(np.int8)
            for one in found.values()
            if one.weight.role == "weight"
        }
        work = network_work(graph, inputs, weights, vectors=vectors)
        traces[name], share = network_trace(work, chip), work.share
        ones = sum(one.ones for one in found.values())
        rates[name] = ones / sum(one.bits * one.stored.size for one in found.values())
    low, sprint = outcomes(traces, chip, response, seed)
    return Report(chip, traces, rates, low, sprint, headline(low, sprint, chip), share, response)
