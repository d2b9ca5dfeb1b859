"""From a network to volts, joules and seconds: AIM's techniques on a chip that is a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.importers import Graph
from quernstone.machine import Machine
from quernstone.pim import wds
from quernstone.pim.chip import CHIPS, Mode, VfTable
from quernstone.pim.grid_chip import chip_response
from quernstone.pim.layers import Codes, nearest_codes, weights_of
from quernstone.pim.mapper import mapping_cost
from quernstone.pim.network import Candidates, calibrate
from quernstone.pim.sensitivity import Headline, headline, outcomes
from quernstone.pim.system import (
    Outcome,
    Settings,
    Trace,
    mapped_round,
    network_trace,
)
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
    clipped: float = 0.005,
) -> dict[str, dict[str, Codes]]:
    """A network's integers: nearest, of few ones, shifted, and both at once.

    Args:
        graph: of the network.
        batches: calibration inputs by name.
        snr: dB, of a layer's output, the mean over the layers, see `compress`.
        shifts: that a layer may have; None: those of `compress`.
        clipped: share of the weights that "wds" may cut, as the paper's does; rounding knows the
            shift, so "lhr+wds" cuts none.

    Returns:
        By `VARIANTS`, the integers by the names of the constants.
    """
    calibration = calibrate(graph, batches)
    both = Candidates(graph, calibration, shifts=shifts).choose(snr)
    rounded = Candidates(graph, calibration, shifts=(0,)).choose(snr)
    moved = wds.search_shifts(list(both.nearest.values()), clipped=clipped)
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
        shape: [m, m] response of another grid than `grid_chip.chip_response` makes.
        seed: of the mapper.

    Raises:
        ValueError: no batches, an unknown chip, a layer that is not supported, figures that
            contradict each other.

    Source: AIM, arXiv 2511.04321 (our reading: the body of the paper was not at hand).
    """
    chip = _chip(chip)
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
    response = chip_response(chip).between_macros() if shape is None else shape
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


@dataclass(frozen=True)
class MappedRound:
    """Where the tasks of a round lie."""

    names: tuple[str, ...]
    """Of the tasks: layer[tile of rows, tile of banks]."""
    hamming: tuple[float, ...]
    group: tuple[int, ...]
    cost: float
    """C V^2 in low power (charge at full toggles, times volts squared), s in sprint."""
    before: float
    """With the tasks in order."""

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["hamming"] = [None if np.isnan(rate) else rate for rate in self.hamming]
        return found


def map_network(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    chip: str | Machine = "aim-7nm-256tops",
    *,
    mode: Mode = "low-power",
    moves: int = 200_000,
    seed: int = 0,
    vectors: int = MOST_VECTORS,
) -> list[MappedRound]:
    """Places a network's nearest integers of 8 bits on the groups of a chip.

    Args:
        graph, inputs: of the network, one input by name.
        chip: as `analyze` takes it.
        mode: whether energy or latency is made small.
        moves, seed: of the annealing.
        vectors: as `analyze` takes it.

    Raises:
        ValueError: an unknown chip or mode, a layer that is not supported.
    """
    chip = _chip(chip)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: got {mode!r}, expected one of {get_args(Mode)}")
    codes = {
        weight.node.name: nearest_codes(weight, graph.constants[weight.constant], 8).stored
        for weight in weights_of(graph)
        if weight.role == "weight"
    }
    weights = {name: stored.astype(np.int8) for name, stored in codes.items()}
    trace = network_trace(network_work(graph, inputs, weights, vectors=vectors), chip)
    table = VfTable.of_chip(chip, mode)
    settings = Settings(mode, moves=moves, seed=seed)
    found = []
    for one in trace.rounds:
        problem, mapped = mapped_round(one, table, chip, settings)
        in_order = np.arange(len(one.tasks)) // problem["places"]
        found.append(
            MappedRound(
                tuple(task.name for task in one.tasks),
                tuple(task.hamming for task in one.tasks),
                tuple(mapped.group.tolist()),
                mapped.cost,
                mapping_cost(in_order, **problem),
            )
        )
    return found


def load_inputs(path: str | os.PathLike[str]) -> list[dict[str, Tensor]]:
    """Inputs of a network from an .npz file, arrays by the names of the inputs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no arrays of numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Path(path).open("rb") as whole, np.load(whole, allow_pickle=False) as file:
            return [{name: torch.from_numpy(file[name]) for name in file.files}]
    except (OSError, TypeError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path}: got no whole .npz file of arrays ({error})") from None


def _chip(chip: str | Machine) -> Machine:
    if isinstance(chip, Machine):
        return chip
    if not isinstance(chip, str):
        raise TypeError(f"chip: got {type(chip).__name__}, expected a name or a Machine")
    if chip not in CHIPS:
        raise ValueError(f"chip: got {chip!r}, expected one of {', '.join(CHIPS)}")
    return CHIPS[chip]
