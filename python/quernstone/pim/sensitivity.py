"""How much the conclusions about a chip depend on each figure that was assumed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernstone.machine import Machine
from quernstone.pim.chip import signoff_toggle_current, with_figure
from quernstone.pim.system import TECHNIQUES, Outcome, Settings, Trace, compare

Floats = NDArray[np.float64]

ASSUMED = (
    "macro.power",
    "macro.static_share",
    "supply.voltage",
    "supply.clock",
    "signoff.drop",
    "device.threshold",
    "device.exponent",
    "booster.patience",
    "booster.relapse",
    "booster.recompute",
    "booster.stall",
    "booster.backoff",
)
"""Electrical figures and those of the control. Sizes of macros change the trace: not here."""


class Headline(NamedTuple):
    """What the paper's abstract says of its chip, here of a model; simulated."""

    mitigation: float
    """Share of the sign-off's drop that all techniques together take away, in low power."""
    efficiency: float
    """Operations a J, over those of int8 weights at the level of sign-off, in low power."""
    speed_up: float
    """The same of operations a s, in sprint."""


PUBLISHED = Headline(0.692, 2.29, 1.152)
"""Of the abstract of AIM (arXiv 2511.04321): a 7 nm chip, post-layout simulation, the best of its
networks."""


@dataclass(frozen=True)
class Change:
    """The headline when one figure is multiplied."""

    figure: str
    factor: float
    headline: Headline | None
    """None where the chip does not work then; `reason` says why."""
    reason: str = ""


def calibrated(shape: Floats, chip: Machine) -> Floats:
    """A response scaled so that the worst macro drops by `signoff.drop` when every cell toggles.

    Args:
        shape: [m, m] the response of a grid, in any unit.
        chip: whose figures set the scale.

    Raises:
        ValueError: a response that is not square, not finite, or drops nowhere.
    """
    if shape.ndim != 2 or shape.shape[0] != shape.shape[1]:
        raise ValueError(f"shape.shape: got {shape.shape}, expected a square")
    worst = float(shape.sum(1).max(initial=0.0))
    if not np.isfinite(shape).all() or not worst > 0.0:
        raise ValueError("shape: got a response without a drop, expected a positive one")
    return shape * (chip.value("signoff.drop", "V") / (worst * signoff_toggle_current(chip)))


def outcomes(
    traces: Mapping[str, Trace],
    chip: Machine,
    shape: Floats,
    seed: int = 0,
    *,
    techniques: Sequence[str] = tuple(TECHNIQUES),
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """`compare` in low power and in sprint, with the response of `calibrated`."""
    response = calibrated(shape, chip)
    low, sprint = (
        compare(traces, chip, response, Settings(mode, seed=seed), techniques=techniques)
        for mode in ("low-power", "sprint")
    )
    return low, sprint


def headline(low: Mapping[str, Outcome], sprint: Mapping[str, Outcome], chip: Machine) -> Headline:
    """The three figures of the abstract, of what `outcomes` gave."""
    return Headline(
        1.0 - low["all"].worst_drop / chip.value("signoff.drop", "V"),
        low["all"].efficiency / low["int8"].efficiency,
        sprint["all"].rate / sprint["int8"].rate,
    )


def sweep(
    traces: Mapping[str, Trace],
    chip: Machine,
    shape: Floats,
    *,
    figures: Sequence[str] = ASSUMED,
    factors: Iterable[float] = (0.5, 2.0),
    seed: int = 0,
    executor: Executor | None = None,
) -> list[Change]:
    """The headline with each assumed figure multiplied, one at a time.

    Args:
        traces, chip: as `compare` takes them.
        shape: the grid's response, see `calibrated`: its scale follows the figures.
        figures: names of figures of the chip.
        factors: what each is multiplied by.
        seed: of the mapper.
        executor: where the cases run, any of `concurrent.futures` or alike (`dask.distributed`'s
            `Client.get_executor()`). None: a pool of processes, one for each core.

    Returns:
        A `Change` for each figure and factor, in their order.

    Raises:
        ValueError: an unknown figure, a factor that is not positive.
    """
    for name in ("int8", "lhr+wds"):
        if name not in traces:
            raise ValueError(f"traces: got {sorted(traces)}, expected {name!r} too")
    only = {name: traces[name] for name in ("int8", "lhr+wds")}
    cases = [(name, float(f), with_figure(chip, name, f)) for name in figures for f in factors]
    arguments = [(only, changed, shape, seed, name, factor) for name, factor, changed in cases]
    if executor is not None:
        return _results(executor, arguments)
    # A forked child would have threads that do not run.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(cases), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return _results(pool, arguments)


Arguments = tuple[Mapping[str, Trace], Machine, Floats, int, str, float]


def _results(executor: Executor, arguments: Sequence[Arguments]) -> list[Change]:
    submit: Callable[..., object] = executor.submit
    futures = [submit(case, *one) for one in arguments]
    return [future.result() for future in futures]  # type: ignore[attr-defined]


def case(
    traces: Mapping[str, Trace],
    chip: Machine,
    shape: Floats,
    seed: int,
    figure: str,
    factor: float,
) -> Change:
    """One case of `sweep`, where it runs."""
    try:
        found = outcomes(traces, chip, shape, seed, techniques=("int8", "all"))
        return Change(figure, factor, headline(*found, chip))
    except ValueError as error:
        return Change(figure, factor, None, str(error))
