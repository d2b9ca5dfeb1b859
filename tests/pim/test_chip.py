"""Levels, the booster and the mapper, against plain Python, integer programmes and identities."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from quernstone.machine import Figure, Machine
from quernstone.pim import reference_chip
from quernstone.pim.booster import Boosted, Control, boost
from quernstone.pim.chip import CHIPS, LEVELS, VfTable, signoff_toggle_current, with_figure
from quernstone.pim.mapper import map_exact, map_tasks, mapping_cost

CHIP = CHIPS["aim-7nm-256tops"]
MODES = ("low-power", "sprint")


def chip_response(macros: int, coupling: float = 0.2) -> NDArray[np.float64]:
    """Neighbours couple; when all macros draw the current of sign-off, each drops by its 140 mV."""
    near = np.exp(-np.abs(np.subtract.outer(range(macros), range(macros))) / coupling)
    shares = near / near.sum(1, keepdims=True)
    return shares * CHIP.value("signoff.drop", "V") / signoff_toggle_current(CHIP)


def currents(rates: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Dynamic currents of toggle rates, and the leakage."""
    static = CHIP.value("macro.static_share", "1")
    full = signoff_toggle_current(CHIP)
    return rates * full * (1 - static), static * full


def problem(seed: int, cycles: int = 300, groups: int = 4, size: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    hamming = rng.uniform(0.2, 0.6, groups * size)
    rates = hamming * rng.uniform(0.1, 1.0, (cycles, 1)) * rng.uniform(0.5, 1.0, (cycles, 1))
    dynamic, leak = currents(rates)
    return {
        "dynamic": dynamic,
        "groups": np.repeat(np.arange(groups), size),
        "hamming": hamming,
        "response": chip_response(groups * size, 1.0),
        "leak": leak,
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_last_level_is_the_sign_off(mode: Any) -> None:
    table = VfTable.of_chip(CHIP, mode)
    assert table.volts[-1] == pytest.approx(0.75, rel=1e-12)
    assert table.hertz[-1] == pytest.approx(1e9, rel=1e-9)
    assert table.need[-1] == pytest.approx(0.61, rel=1e-9)


def test_lower_levels_save_voltage_or_gain_clock() -> None:
    low, sprint = (VfTable.of_chip(CHIP, mode) for mode in MODES)
    assert list(low.volts) == sorted(low.volts)
    assert set(low.hertz) == {1e9}
    assert list(sprint.hertz) == sorted(sprint.hertz, reverse=True)
    assert set(sprint.volts) == {0.75}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_a_level_carries_its_own_toggle_rate_and_no_more(mode: Any, level: int) -> None:
    table = VfTable.of_chip(CHIP, mode)
    response = chip_response(4)

    def run(rate: float) -> Boosted:
        dynamic, leak = currents(np.full((8, 4), rate))
        return boost(dynamic, table, range(4), [0.2] * 4, response, leak=leak, level=level)

    assert run(LEVELS[level]).failures.sum() == 0
    with pytest.raises(ValueError, match="supply carries it"):
        run(LEVELS[level] * 1.001)


def test_a_safe_level_is_the_first_that_no_input_exceeds() -> None:
    table = VfTable.of_chip(CHIP)
    assert table.safe_level([0.0, 0.2, 0.2001, 0.6, 0.61, 1.0, np.nan]).tolist() == [
        0, 0, 1, 8, 9, 9, 9,
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [False, True])
def test_the_booster_does_what_the_reference_does(mode: Any, seed: int, shared: bool) -> None:
    table = VfTable.of_chip(CHIP, mode)
    given = problem(seed)
    control = Control(patience=10, relapse=40, recompute=6, stall=3)
    domains = [0, 0, 2, 2] if shared else [0, 1, 2, 3]
    got = boost(**given, table=table, domains=domains, control=control)
    groups = given["groups"]
    safe = table.safe_level([given["hamming"][groups == g].max() for g in range(4)])
    want, worst = reference_chip.boost(
        given["dynamic"],
        table,
        groups.tolist(),
        safe.tolist(),
        given["response"],
        leak=np.full(12, given["leak"]),
        domains=domains,
        control=control,
    )
    assert got.cycles.tolist() == [g.cycles for g in want]
    assert got.failures.tolist() == [g.failures for g in want]
    assert got.beyond.tolist() == [g.beyond for g in want]
    np.testing.assert_allclose(got.joules, [g.joules for g in want], rtol=1e-12)
    np.testing.assert_allclose(got.seconds, [g.time for g in want], rtol=1e-12)
    np.testing.assert_allclose(got.worst, worst, rtol=1e-12)
    levels = [np.bincount(g.levels, minlength=len(LEVELS)) for g in want]
    np.testing.assert_array_equal(got.at_level, levels)
    assert got.failures.sum() > 0


def test_without_failures_the_energy_is_that_of_the_table() -> None:
    table = VfTable.of_chip(CHIP)
    given = problem(0)
    level = 8
    got = boost(**given, table=table, level=level)
    assert got.failures.sum() == 0
    up = table.volts[level] / table.nominal_volts
    charge = given["dynamic"].sum() / table.nominal_hertz
    leaked = given["leak"] * given["dynamic"].size / table.hertz[level]
    assert got.energy == pytest.approx(table.volts[level] * up * (charge + leaked), rel=1e-12)
    assert got.time == pytest.approx(300 / table.hertz[level], rel=1e-12)


def test_a_failure_costs_the_lost_work_and_the_stall() -> None:
    table = VfTable.of_chip(CHIP)
    rates = np.full((40, 1), 0.1)
    rates[20] = 0.5  # above the first level, which is where a Hamming rate of 0.2 begins
    dynamic, leak = currents(rates)
    control = Control(patience=10**6, recompute=7, stall=5)
    got = boost(dynamic, table, [0], [0.2], chip_response(1), leak=leak, control=control)
    # Each failure takes one cycle, loses 7 of work and stands 5; the levels rise to 50 %.
    assert got.failures[0] == 6
    assert got.beyond[0] == 6
    assert got.cycles[0] == 40 + 6 * (1 + 7 + 5)


def test_patience_lets_a_group_become_more_aggressive_than_its_weights_allow() -> None:
    table = VfTable.of_chip(CHIP)
    dynamic, leak = currents(np.full((4000, 4), 0.22))
    given = {"groups": [0, 0, 1, 1], "hamming": [0.5] * 4, "response": chip_response(4)}
    got = boost(dynamic, table, **given, leak=leak)
    fixed = boost(dynamic, table, **given, leak=leak, level=int(table.safe_level(0.5)[0]))
    # The level of 25 % carries them; that of 20 %, tried again and again, does not.
    assert got.at_level[:, 1].min() > 2000
    assert 0 < got.failures.sum() == got.failures.sum() - got.beyond.sum()
    assert got.energy < fixed.energy
    stubborn = boost(dynamic, table, **given, leak=leak, control=Control(backoff=1))
    assert stubborn.failures.sum() > got.failures.sum()


def test_levels_over_time_are_a_plan() -> None:
    got = boost(**problem(1), table=VfTable.of_chip(CHIP), control=Control(patience=10))
    plan = got.plan()
    assert plan.makespan == pytest.approx(got.time)
    assert len(plan.resources) == 4
    assert plan.busy("group 0") == pytest.approx(got.seconds[0])


def test_a_supply_that_does_not_carry_a_group_is_told() -> None:
    dynamic, leak = currents(np.ones((10, 1)))
    with pytest.raises(ValueError, match="supply carries it at the last level"):
        boost(dynamic * 1.5, VfTable.of_chip(CHIP), [0], [1.0], chip_response(1), leak=leak)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [0, 0, 2, 2]}, "gaps"),
        ({"groups": [0, 0, 1]}, r"groups.shape\[0\]: got 3"),
        ({"hamming": [0.5] * 3}, "hamming.shape"),
        ({"hamming": [1.5] * 4}, "rates"),
        ({"response": np.zeros((4, 3))}, r"response.shape\[1\]"),
        ({"response": np.full((4, 4), np.nan)}, "response"),
        ({"dynamic": np.full((3, 4), -1.0)}, "dynamic"),
        ({"dynamic": np.full((3, 4), np.nan)}, "dynamic"),
        ({"dynamic": np.zeros(4)}, "dynamic.ndim"),
        ({"leak": [0.1] * 3}, "leak.shape"),
        ({"leak": -1.0}, "leak"),
        ({"domains": [0]}, r"domains.shape\[0\]"),
        ({"domains": [0, 5]}, "domain"),
        ({"level": 10}, "level: got 10"),
    ],
)
def test_bad_input_of_the_booster_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "dynamic": np.zeros((3, 4)),
        "groups": [0, 0, 1, 1],
        "hamming": [0.5] * 4,
        "response": np.eye(4),
    }
    with pytest.raises(ValueError, match=message):
        boost(**{**given, **change}, table=VfTable.of_chip(CHIP))


def test_types_of_the_booster_are_named() -> None:
    table = VfTable.of_chip(CHIP)
    with pytest.raises(TypeError, match="groups"):
        boost(np.zeros((1, 1)), table, [0.5], [0.5], np.eye(1))
    with pytest.raises(TypeError, match="dynamic"):
        boost([["x"]], table, [0], [0.5], np.eye(1))
    with pytest.raises(TypeError, match="patience"):
        Control(patience=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stall"):
        Control(stall=-1)
    # Each is simulated: a call would not end.
    with pytest.raises(ValueError, match=r"stall: got 65536, expected 0 or more and below 2\^16"):
        Control(stall=1 << 16)


def test_no_work_takes_no_time() -> None:
    got = boost(np.zeros((0, 2)), VfTable.of_chip(CHIP), [0, 1], [0.5, 0.5], np.eye(2))
    assert isinstance(got, Boosted)
    assert (got.time, got.energy, got.worst_drop) == (0.0, 0.0, 0.0)


def test_figures_that_contradict_each_other_are_told() -> None:
    for name, value, unit, words in (
        ("signoff.drop", 0.6, "V", "threshold"),
        ("macro.static_share", 1.5, "1", "static_share"),
    ):
        figure = Figure(value, unit, "assumed")
        chip = Machine("odd", {**CHIP.figures, name: figure})
        with pytest.raises(ValueError, match=words):
            VfTable.of_chip(chip)
    with pytest.raises(ValueError, match="levels"):
        VfTable.of_chip(CHIP, levels=(0.5, 0.4))
    assert with_figure(CHIP, "signoff.drop", 0.5).value("signoff.drop", "V") == 0.07


def random_tasks(seed: int, tasks: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "rates": rng.uniform(0.2, 0.6, tasks),
        "sets": np.sort(rng.integers(0, 3, tasks)),
        "weights": rng.uniform(0.5, 2.0, tasks),
    }


@pytest.mark.parametrize("objective", ["energy", "latency"])
@pytest.mark.parametrize("seed", range(6))
def test_the_exact_mapping_is_that_of_brute_force(objective: Any, seed: int) -> None:
    mode = "low-power" if objective == "energy" else "sprint"
    table = VfTable.of_chip(CHIP, mode)
    given = random_tasks(seed, 7)
    level = table.safe_level(given["rates"]).tolist()
    columns = (level, given["sets"].tolist(), given["weights"].tolist(), table, objective)
    least = min(
        reference_chip.mapping_cost(group, *columns) for group in reference_chip.divisions(7, 4, 2)
    )
    exact = map_exact(**given, table=table, groups=4, places=2, objective=objective)
    assert exact.cost == pytest.approx(least, rel=1e-12)
    again = mapping_cost(exact.group, **given, table=table, groups=4, places=2, objective=objective)
    assert again == exact.cost
    assert reference_chip.mapping_cost(exact.group.tolist(), *columns) == pytest.approx(least)


@pytest.mark.parametrize("objective", ["energy", "latency"])
@pytest.mark.parametrize("seed", range(8))
def test_annealing_comes_within_a_percent_of_the_optimum(objective: Any, seed: int) -> None:
    table = VfTable.of_chip(CHIP, "low-power" if objective == "energy" else "sprint")
    given = random_tasks(seed, 10)
    common = {**given, "table": table, "groups": 4, "places": 3, "objective": objective}
    exact = map_exact(**common)
    found = map_tasks(**common, moves=20_000, seed=seed)
    assert exact.cost <= found.cost * (1 + 1e-12)
    assert found.cost <= 1.01 * exact.cost
    assert found.group.tolist() == map_tasks(**common, moves=20_000, seed=seed).group.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_energy_is_that_of_an_integer_programme(seed: int) -> None:
    """x[i, g] places, y[g, l] a group's level; cost[i] >= weight volts^2 where both hold."""
    table = VfTable.of_chip(CHIP)
    tasks, groups, places = 6, 3, 2
    given = random_tasks(seed, tasks)
    level = table.safe_level(given["rates"])
    squares = np.square(table.volts)
    count = len(squares)
    # z[i, g, l]: task i is in group g, which is at level l.
    size = tasks * groups * count + groups * count
    z = np.arange(tasks * groups * count).reshape(tasks, groups, count)
    y = np.arange(groups * count).reshape(groups, count) + z.size
    costs = np.zeros(size)
    for i, g, k in itertools.product(range(tasks), range(groups), range(count)):
        costs[z[i, g, k]] = given["weights"][i] * squares[k]
    rows, low, high = [], [], []

    def add(indices: Any, values: Any, least: float, most: float) -> None:
        row = np.zeros(size)
        row[np.ravel(indices)] = values
        rows.append(row)
        low.append(least)
        high.append(most)

    for g in range(groups):
        add(y[g], 1.0, 1, 1)
        add(z[:, g, :], 1.0, 0, places)
    for i in range(tasks):
        add(z[i], 1.0, 1, 1)
        for g, k in itertools.product(range(groups), range(count)):
            add([z[i, g, k], y[g, k]], [1.0, -1.0], -1, 0)
            if k < level[i]:
                add([z[i, g, k]], 1.0, 0, 0)
    found = milp(
        costs,
        constraints=LinearConstraint(np.array(rows), low, high),
        bounds=Bounds(0, 1),
        integrality=np.ones(size),
    )
    exact = map_exact(**given, table=table, groups=groups, places=places)
    assert exact.cost == pytest.approx(found.fun, rel=1e-6)


def test_pinned_tasks_stay_where_they_are() -> None:
    table = VfTable.of_chip(CHIP)
    given = random_tasks(3, 9)
    pinned = [-1, 2, -1, -1, 0, -1, 2, -1, -1]
    for found in (
        map_tasks(**given, table=table, groups=3, places=4, pinned=pinned, moves=5000),
        map_exact(**given, table=table, groups=3, places=4, pinned=pinned),
    ):
        assert [found.group[i] for i in (1, 4, 6)] == [2, 0, 2]
        assert np.bincount(found.group, minlength=3).max() <= 4


def test_a_whole_chip_is_mapped_no_worse_than_sorted() -> None:
    table = VfTable.of_chip(CHIP)
    rates = np.random.default_rng(0).uniform(0.2, 0.6, 64)
    order = np.argsort(-rates, kind="stable")
    group = np.empty(64, np.int64)
    group[order] = np.arange(64) // 4
    best = mapping_cost(group, rates, table, groups=16, places=4)
    assert map_tasks(rates, table, groups=16, places=4, moves=20_000).cost <= best * (1 + 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": [0.5] * 9}, "at most one for each macro"),
        ({"rates": []}, "rates"),
        ({"rates": [[0.5]]}, "rates.ndim"),
        ({"rates": [1.5] * 4}, "rates"),
        ({"pinned": [0, 0, 0, -1]}, "pinned: tasks of one group: got 3"),
        ({"pinned": [7, 0, 0, -1]}, "pinned"),
        ({"weights": [1.0] * 3}, "weights.shape"),
        ({"weights": [-1.0] * 4}, "weight"),
        ({"weights": [np.inf] * 4}, "weight"),
        ({"sets": [0] * 3}, "sets.shape"),
        ({"groups": 0}, "groups"),
        ({"places": 0}, "places"),
        ({"objective": "speed"}, "objective"),
        ({"moves": -1}, "moves"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_of_the_mapper_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"rates": [0.3, 0.4, 0.5, 0.6], "groups": 4, "places": 2}
    with pytest.raises(ValueError, match=message):
        map_tasks(**{**given, **change}, table=VfTable.of_chip(CHIP))


def test_a_problem_too_large_for_the_exact_mapping_is_refused() -> None:
    rates = np.random.default_rng(1).uniform(0.2, 0.6, 40)
    with pytest.raises(ValueError, match="2\\^22"):
        map_exact(rates, VfTable.of_chip(CHIP, "sprint"), groups=10, places=4, objective="latency")
