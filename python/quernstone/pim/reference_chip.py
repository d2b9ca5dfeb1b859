"""The booster and the mapper in plain Python: what the compiled ones are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quernstone.pim.booster import Control
from quernstone.pim.chip import VfTable


@dataclass
class _Group:
    macros: list[int]
    level: int
    aim: int
    time: float = 0.0
    done: int = 0
    standing: int = 0
    calm: int = 0
    since: int = 0
    wait: int = 0
    cycles: int = 0
    joules: float = 0.0
    failures: int = 0
    beyond: int = 0
    levels: list[int] = field(default_factory=list)


def boost(
    dynamic: NDArray[np.float64],
    table: VfTable,
    groups: Sequence[int],
    safe: Sequence[int],
    response: NDArray[np.float64],
    *,
    leak: NDArray[np.float64],
    domains: Sequence[int],
    control: Control,
    level: int | None = None,
) -> tuple[list[_Group], NDArray[np.float64]]:
    """What `quernstone.pim.boost` does; `safe` are levels. Returns the groups and worst drops."""
    work, macros = dynamic.shape
    state = []
    for g in range(len(domains)):
        first = safe[g] if level is None else level
        members = [m for m in range(macros) if groups[m] == g]
        state.append(_Group(members, first, first, wait=control.patience))
    amperes = leak.copy()
    worst = np.zeros(macros)
    while any(group.done < work for group in state):
        working = [g for g, group in enumerate(state) if group.done < work]
        begin = min(state[g].time for g in working)
        turn = [g for g in working if state[g].time == begin]
        clocks = {}
        for g in turn:
            group = state[g]
            clocks[g] = clock = max(state[k].level for k in working if domains[k] == domains[g])
            volts, hertz = table.volts[group.level], table.hertz[clock]
            up = volts / table.nominal_volts
            for m in group.macros:
                moving = dynamic[group.done, m] * up if group.standing == 0 else 0.0
                amperes[m] = leak[m] * up + moving * hertz / table.nominal_hertz
                group.joules += volts * (leak[m] * up / hertz + moving / table.nominal_hertz)
            group.time += 1 / hertz
            group.cycles += 1
            group.levels.append(group.level)
        for g in turn:
            group = state[g]
            volts, works = table.volts[group.level], group.standing == 0
            drops = response[group.macros] @ amperes
            worst[group.macros] = np.maximum(worst[group.macros], drops)
            failed = works and bool((volts - drops < table.need[clocks[g]] * (1 - 1e-12)).any())
            if not works:
                group.standing -= 1
            elif failed:
                group.failures += 1
                group.beyond += group.level >= safe[g]
                if level is None:
                    if group.level < safe[g]:
                        if group.since < control.relapse:
                            group.aim = min(safe[g], group.aim + 1)
                            group.wait *= control.backoff
                        group.level = safe[g]
                    else:
                        group.level = min(len(table.levels) - 1, group.level + 1)
                group.done = max(0, group.done - control.recompute)
                group.standing = control.stall
                group.calm = group.since = 0
            else:
                group.done += 1
                group.calm += 1
                group.since += 1
                if group.since == control.relapse:
                    group.wait = control.patience
                needed = control.patience if group.level > group.aim else group.wait
                if level is None and group.calm >= needed:
                    group.calm = 0
                    before = group.level
                    if group.level > safe[g]:
                        group.level -= 1
                    elif group.level > group.aim:
                        group.level = group.aim
                    elif group.aim > 0:
                        group.aim -= 1
                        group.level = group.aim
                    if group.level != before:
                        group.since = 0
            if group.done >= work:
                amperes[group.macros] = leak[group.macros] * (volts / table.nominal_volts)
    return state, worst


def mapping_cost(
    group: Sequence[int],
    level: Sequence[int],
    sets: Sequence[int],
    weights: Sequence[float],
    table: VfTable,
    objective: str,
) -> float:
    """What `quernstone.pim.mapping_cost` gives."""
    tasks = range(len(group))
    top = {g: max(level[i] for i in tasks if group[i] == g) for g in set(group)}
    if objective == "energy":
        return math.fsum(weights[i] * table.volts[top[group[i]]] ** 2 for i in tasks)
    domains = [{group[i] for i in tasks if sets[i] == s} for s in set(sets)]
    merged = True
    while merged:
        merged = False
        for a, b in itertools.combinations(range(len(domains)), 2):
            if domains[a] & domains[b]:
                domains[a] |= domains.pop(b)
                merged = True
                break
    slowest = {g: max(top[k] for k in domain) for domain in domains for g in domain}
    times = [weights[i] / table.hertz[slowest[group[i]]] for i in tasks]
    return max(times) + 1e-3 * math.fsum(times) / len(times)


def divisions(tasks: int, groups: int, places: int) -> Iterator[tuple[int, ...]]:
    """Every way to put tasks into groups with room for so many."""
    for group in itertools.product(range(groups), repeat=tasks):
        if all(group.count(g) <= places for g in set(group)):
            yield group
