"""A network on a chip of macros: rounds of work, currents, drops, and what the groups make of them.

Simulated: the chip is a model (`quernstone.pim.chip`), the integers are the network's own.

Axes: n tasks (a macro's worth of a layer), t cycles, m macros, g groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernstone.machine import Machine
from quernstone.pim import api
from quernstone.pim.booster import Boosted, Control, boost
from quernstone.pim.chip import Mode, VfTable, signoff_toggle_current
from quernstone.pim.macro import Macro
from quernstone.pim.mapper import Mapped, map_tasks
from quernstone.pim.work import NetworkWork, Work

Floats = NDArray[np.float64]


class Task(NamedTuple):
    """What one macro holds in a round."""

    layer: int
    """Index of its layer: tasks of one layer share a clock."""
    name: str
    hamming: float
    """HR of the macro, cells that the layer does not fill included; NaN where the weights are not
    known beforehand."""
    toggles: Floats
    """[t] share of the macro's cells whose product changes, cycle by cycle."""


class Round(NamedTuple):
    """Consecutive layers that the chip holds at once, streaming their inputs."""

    tasks: tuple[Task, ...]
    cycles: int
    """t"""
    repeat: float
    """How often those cycles stand for the real number of vectors."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's toggles on the macros of a chip."""

    rounds: tuple[Round, ...]
    macro: Macro
    operations: float
    """Two for each product of a weight and an input."""

    @property
    def hamming(self) -> float:
        """Mean HR of the macros whose weights are known beforehand."""
        known = [t.hamming for r in self.rounds for t in r.tasks if not np.isnan(t.hamming)]
        return float(np.mean(known)) if known else 0.0


def chip_macro(chip: Machine) -> Macro:
    """The macro of a chip, for unsigned inputs."""
    rows, banks, weight_bits, input_bits = (
        round(chip.value(f"macro.{name}", "1"))
        for name in ("rows", "banks", "weight_bits", "input_bits")
    )
    return Macro(rows, banks, weight_bits, input_bits, input_signed=False)


def network_trace(work: NetworkWork | Sequence[Work], chip: Machine) -> Trace:
    """Tiles layers over macros, packs consecutive ones into rounds, and counts their toggles.

    A round takes layers in the network's order while the chip has macros for them; a layer with
    more tiles than that is split. All layers of a round stream at once: the one with the most
    vectors sets its length, and the others stand still afterwards.

    Args:
        work: of the network.
        chip: with the figures of those in `quernstone.pim.chip.CHIPS`.

    Raises:
        ValueError: no layers, or integers that the macro does not hold.
    """
    layers = work.layers if isinstance(work, NetworkWork) else tuple(work)
    if not layers:
        elsewhere = ", ".join(work.elsewhere) if isinstance(work, NetworkWork) else ""
        got = f"only layers that macros do not take ({elsewhere})" if elsewhere else "no layers"
        raise ValueError(f"work: got {got}, expected one at least")
    macro, macros = chip_macro(chip), round(chip.value("chip.macros", "1"))
    rounds: list[Round] = []
    waiting: list[tuple[int, Work, list[tuple[int, int]]]] = []
    room = macros

    def close() -> None:
        nonlocal waiting, room
        if waiting:
            rounds.append(_round(waiting, macro))
        waiting, room = [], macros

    for index, layer in enumerate(layers):
        across, down = macro.tiles(*layer.weights.shape)
        tiles = [(r, b) for r in range(across) for b in range(down)]
        if len(tiles) > room and len(tiles) <= macros:
            close()
        while tiles:
            waiting.append((index, layer, tiles[:room]))
            tiles, room = tiles[room:], room - len(tiles[:room])
            if not room:
                close()
    close()
    return Trace(tuple(rounds), macro, 2.0 * sum(layer.products for layer in layers))


def _round(parts: Sequence[tuple[int, Work, list[tuple[int, int]]]], macro: Macro) -> Round:
    longest = max(layer.vectors for _, layer, _ in parts)
    kept = max(len(layer.inputs) for _, layer, _ in parts)
    cycles = kept * macro.cycles_per_vector
    tasks = []
    for index, layer, tiles in parts:
        # As long, beside the longest, as the layer's own vectors beside its.
        share = max(1, round(kept * layer.vectors / longest))
        inputs = layer.inputs[:share]
        toggled = api.toggle_rate(layer.weights, inputs, macro, "macro")
        hamming = api.hamming_rate(layer.weights, macro.weight_bits, per="macro", macro=macro)
        for r, b in tiles:
            toggles = np.zeros(cycles)
            toggles[: toggled.shape[1]] = toggled[r, :, b]
            rate = float(hamming[r, b]) if layer.known else float("nan")
            tasks.append(Task(index, f"{layer.name}[{r},{b}]", rate, toggles))
    return Round(tuple(tasks), cycles, longest / kept)


@dataclass(frozen=True)
class Settings:
    """What of AIM a chip uses beside the network's weights.

    Args:
        mode: "low-power" or "sprint", see `quernstone.pim.chip.Mode`.
        booster: whether groups adapt; without, all stay at the level of sign-off.
        mapping: whether tasks are gathered by Hamming rate; without, they lie in order.
        control: of the booster; None: what the chip's figures say.
        moves, seed: of the mapper's annealing.
    """

    mode: Mode = "low-power"
    booster: bool = True
    mapping: bool = True
    control: Control | None = None
    moves: int = 20_000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a network took; simulated."""

    settings: Settings
    seconds: float
    joules: float
    worst_drop: float
    """V, of any macro in any cycle."""
    failures: int
    """In the cycles that were simulated."""
    beyond: int
    """Of these, at or above the level that the group's own weights call safe."""
    cycles: int
    """Simulated, of all groups."""
    operations: float
    rounds: tuple[Boosted, ...] = field(repr=False)

    @property
    def efficiency(self) -> float:
        """Operations a J."""
        return self.operations / self.joules

    @property
    def rate(self) -> float:
        """Operations a s."""
        return self.operations / self.seconds


def run(trace: Trace, chip: Machine, response: Floats, settings: Settings | None = None) -> Outcome:
    """Takes a trace through a chip, round after round.

    A macro draws its static share always and the rest in proportion to its toggles, all of it when
    every cell toggles. Macros without a task are switched off.

    Args:
        trace: of a network.
        chip: as the trace was made for; its electrical figures may be others.
        response: [m, m] V at one macro for each A at another.
        settings: what is used; None: all of it.

    Returns:
        An `Outcome`. Equal arguments give equal ones.

    Raises:
        ValueError: a response of another number of macros, figures that contradict each other, a
            supply that does not carry the work.

    Source: AIM, arXiv 2511.04321 (our reading). Oracles: those of `boost` and `map_tasks`, and
    direct solves of the grid.
    """
    settings = Settings() if settings is None else settings
    macros, groups = (round(chip.value(f"chip.{name}", "1")) for name in ("macros", "groups"))
    if macros % groups:
        raise ValueError(f"chip.macros: got {macros}, expected a multiple of {groups} groups")
    if response.shape != (macros, macros):
        raise ValueError(f"response.shape: got {response.shape}, expected {(macros, macros)}")
    table = VfTable.of_chip(chip, settings.mode)
    control = Control.of_chip(chip) if settings.control is None else settings.control
    static = chip.value("macro.static_share", "1")
    full = signoff_toggle_current(chip)
    done = []
    seconds = joules = 0.0
    for one in trace.rounds:
        place = _places(one, table, chip, settings)
        dynamic = np.zeros((one.cycles, macros))
        hamming, leak = np.zeros(macros), np.zeros(macros)
        for task, at in zip(one.tasks, place, strict=True):
            dynamic[:, at] = task.toggles * (full * (1.0 - static))
            hamming[at], leak[at] = task.hamming, full * static
        group = np.arange(macros) // (macros // groups)
        used = np.unique(group[place])
        inside = np.flatnonzero(np.isin(group, used))
        numbers = np.searchsorted(used, group[inside])
        boosted = boost(
            dynamic[:, inside],
            table,
            numbers,
            hamming[inside],
            response[np.ix_(inside, inside)],
            leak=leak[inside],
            domains=_domains(one, np.searchsorted(used, group[place]), len(used)),
            control=control,
            level=None if settings.booster else len(table.levels) - 1,
        )
        seconds += boosted.time * one.repeat
        joules += boosted.energy * one.repeat
        done.append(boosted)
    return Outcome(
        settings,
        seconds,
        joules,
        max(b.worst_drop for b in done),
        sum(int(b.failures.sum()) for b in done),
        sum(int(b.beyond.sum()) for b in done),
        sum(int(b.cycles.sum()) for b in done),
        trace.operations,
        tuple(done),
    )


def mapped_round(
    one: Round, table: VfTable, chip: Machine, settings: Settings
) -> tuple[dict[str, Any], Mapped]:
    """The mapper's problem of a round, as arguments of `map_tasks`, and its solution."""
    groups = round(chip.value("chip.groups", "1"))
    energy = settings.mode == "low-power"
    charge = signoff_toggle_current(chip) / table.nominal_hertz
    problem: dict[str, Any] = {
        "rates": [task.hamming for task in one.tasks],
        "table": table,
        "groups": groups,
        "places": round(chip.value("chip.macros", "1")) // groups,
        "sets": [task.layer for task in one.tasks],
        "weights": [
            charge * float(task.toggles.sum()) if energy else float(one.cycles)
            for task in one.tasks
        ],
        "objective": "energy" if energy else "latency",
    }
    return problem, map_tasks(**problem, moves=settings.moves, seed=settings.seed)


def _places(one: Round, table: VfTable, chip: Machine, settings: Settings) -> NDArray[np.int64]:
    """The macro of each task."""
    count = len(one.tasks)
    if not settings.mapping:
        return np.arange(count)
    problem, mapped = mapped_round(one, table, chip, settings)
    places = problem["places"]
    taken = np.zeros(problem["groups"], np.int64)
    found = np.empty(count, np.int64)
    for i, g in enumerate(mapped.group.tolist()):
        found[i] = g * places + taken[g]
        taken[g] += 1
    return found


def _domains(one: Round, group: NDArray[np.int64], groups: int) -> list[int]:
    """Groups that hold parts of one layer, or share one with a group that does, are one domain."""
    domain = list(range(groups))
    home: dict[int, int] = {}
    for task, g in zip(one.tasks, group.tolist(), strict=True):
        first = domain[home.setdefault(task.layer, g)]
        other = domain[g]
        domain = [first if d == other else d for d in domain]
    return domain


TECHNIQUES: Mapping[str, tuple[str, bool, bool]] = {
    "int8": ("int8", False, False),
    "lhr": ("lhr", False, False),
    "wds": ("wds", False, False),
    "lhr+wds": ("lhr+wds", False, False),
    "booster": ("int8", True, False),
    "booster+mapping": ("int8", True, True),
    "all": ("lhr+wds", True, True),
}
"""By name: the trace, whether there is a booster, whether tasks are mapped by Hamming rate. A
mapping without a booster would change nothing but which macros are neighbours."""


def compare(
    traces: Mapping[str, Trace],
    chip: Machine,
    response: Floats,
    settings: Settings | None = None,
    *,
    techniques: Sequence[str] = tuple(TECHNIQUES),
) -> dict[str, Outcome]:
    """AIM's techniques alone and together, in one mode.

    Args:
        traces: of the same network with its weights as they are ("int8"), after Hamming-aware
            rounding ("lhr"), shifted ("wds"), and both ("lhr+wds").
        chip, response: as `run` takes them.
        settings: mode, control and seeds; which techniques are used is set here.
        techniques: names of `TECHNIQUES`.

    Raises:
        ValueError: an unknown technique, or its trace is missing.
    """
    base = Settings() if settings is None else settings
    found = {}
    for name in techniques:
        if name not in TECHNIQUES:
            known = ", ".join(TECHNIQUES)
            raise ValueError(f"techniques: got {name!r}, expected some of {known}")
        of, booster, mapping = TECHNIQUES[name]
        if of not in traces:
            raise ValueError(f"traces: got {sorted(traces)}, expected {of!r} too")
        chosen = replace(base, booster=booster, mapping=mapping)
        found[name] = run(traces[of], chip, response, chosen)
    return found


def worst_currents(trace: Trace, chip: Machine, response: Floats) -> Floats:
    """[m] A of the cycle with the worst drop, all at the level of sign-off, tasks in order.

    Args:
        trace, chip, response: as `run` takes them.
    """
    macros = round(chip.value("chip.macros", "1"))
    static, full = chip.value("macro.static_share", "1"), signoff_toggle_current(chip)
    worst, found = -1.0, np.zeros(macros)
    for one in trace.rounds:
        amperes = np.zeros((one.cycles, macros))
        for at, task in enumerate(one.tasks):
            amperes[:, at] = full * (static + (1.0 - static) * task.toggles)
        drops = (amperes @ response.T).max(axis=1)
        cycle = int(drops.argmax())
        if drops[cycle] > worst:
            worst, found = float(drops[cycle]), amperes[cycle].copy()
    return found
