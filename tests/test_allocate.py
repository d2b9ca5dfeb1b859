"""The multiple-choice knapsack: the best choice, the same one in every run, and what is refused."""

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from quernstone import allocate as module
from quernstone.allocate import Allocation, allocate

Options = Sequence[Sequence[tuple[float, float]]]


def total(options: Options, choice: Sequence[int], field: int) -> float:
    """Added up from the first group on, as `sum` does not from Python 3.12 on."""
    result: float = 0
    for group, index in zip(options, choice, strict=True):
        result = result + group[index][field]
    return result


def best_of_all(options: Options, budget: float) -> Allocation | None:
    """The least (loss, cost, choice) of every choice that the budget allows."""
    choices = itertools.product(*(range(len(group)) for group in options))
    fitting = [choice for choice in choices if total(options, choice, 0) <= budget]
    if not fitting:
        return None
    loss, cost, choice = min((total(options, c, 1), total(options, c, 0), c) for c in fitting)
    return Allocation(choice, cost, loss)


def loss_by_highs(options: Options, budget: float) -> float:
    """The least loss according to scipy's branch-and-cut solver."""
    sizes = [len(group) for group in options]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    flat = [pair for group in options for pair in group]
    one_each = (owner == np.arange(len(sizes))[:, None]).astype(float)
    result = milp(
        [loss for _, loss in flat],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint([[cost for cost, _ in flat]], ub=budget),
        ],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return float(result.fun)


def groups(costs: st.SearchStrategy[Any], losses: st.SearchStrategy[Any]) -> Any:
    return st.lists(st.lists(st.tuples(costs, losses), min_size=1, max_size=5), max_size=5)


def same_number(a: float, b: float) -> bool:
    return a == b and type(a) is type(b)


@settings(max_examples=300, deadline=None)
@given(groups(st.integers(0, 6), st.integers(-5, 5)), st.integers(0, 20))
def test_whole_numbers_give_the_best_of_all_choices_and_the_first_of_equals(
    options: Options, budget: int
) -> None:
    want = best_of_all(options, budget)
    if want is None:
        with pytest.raises(ValueError, match="the least cost possible"):
            allocate(options, budget)
        return
    got = allocate(options, budget)
    assert got == want
    assert type(got.cost) is int


# The bounds interpolate: over steps of 1e300, slopes of 1e-320 would not do.
TINY_SLOPES = [[(k * 1e300, v * 1e-20) for k, v in enumerate((7.0, 3.0, 2.0, 1.0))]] * 4
ANY_COST = st.floats(0, 1) | st.floats(0, 1e300) | st.floats(0, 1e-300) | st.just(0.1)
ANY_LOSS = st.floats(-1, 1) | st.floats(-1e300, 1e300) | st.floats(-1e-300, 1e-300) | st.just(0.1)


@settings(max_examples=400, deadline=None)
@given(groups(ANY_COST, ANY_LOSS), ANY_COST | st.floats(0, 3) | st.just(0.3))
@example([[(0.1, 0.0), (0.0, 1.0)]] * 3, 0.3)  # 0.1 + 0.1 + 0.1 > 0.3
@example([[(0.0, 0.0), (1e-310, -5.0), (2e-310, -6.0)]] * 3, 3e-310)  # slopes beyond float64
@example(TINY_SLOPES, 5e300)
@example([[(1e16, 0.0), (0.0, 9.0)], [(1.0, -1.0), (0.0, 0.0)], [(1.0, -1.0), (0.0, 0.0)]], 1e16)
def test_floats_of_every_size_give_the_best_of_all_choices(options: Options, budget: float) -> None:
    want = best_of_all(options, budget)
    if want is None:
        with pytest.raises(ValueError, match="the least cost possible"):
            allocate(options, budget)
        return
    got = allocate(options, budget)
    assert (got.loss, got.cost) == (want.loss, want.cost)
    assert same_number(got.cost, total(options, got.choice, 0) if options else 0)
    assert got.loss == total(options, got.choice, 1)


def convex(random: random.Random, groups: int, options: int) -> Options:
    """Errors that fall geometrically: bits of a tensor, slots of a cache."""
    return [
        [(cost, round(1e6 * scale * 0.95**cost)) for cost in range(options)]
        for scale in (random.random() for _ in range(groups))
    ]


def rough(random: random.Random, groups: int, options: int) -> Options:
    return [[(cost, random.randint(0, 10**6)) for cost in range(options)] for _ in range(groups)]


def correlated(random: random.Random, groups: int, options: int) -> Options:
    """The hard kind: no option is much better value than another."""
    return [
        [(cost, -cost - 10 * (cost > 0)) for cost in random.choices(range(65), k=options)]
        for _ in range(groups)
    ]


@pytest.mark.parametrize(
    ("make", "groups", "options", "budget"),
    [
        (convex, 60, 65, 2000),
        (rough, 60, 65, 900),
        (rough, 25, 9, 77),
        (correlated, 30, 20, 700),
    ],
)
def test_agrees_with_highs_on_whole_costs(
    make: Any, groups: int, options: int, budget: int
) -> None:
    drawn = make(random.Random(groups + budget), groups, options)
    got = allocate(drawn, budget)
    assert got.cost == total(drawn, got.choice, 0) <= budget
    assert got.loss == total(drawn, got.choice, 1)
    # Losses are whole: the solver's tolerances, 1e-6, vanish when its result is rounded.
    assert got.loss == round(loss_by_highs(drawn, budget))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_highs_on_floating_costs(seed: int) -> None:
    draw = random.Random(seed)
    drawn = [[(draw.random(), draw.gauss(0, 1)) for _ in range(8)] for _ in range(200)]
    budget = 40.0 + 20.0 * seed
    got = allocate(drawn, budget)
    assert got.cost == total(drawn, got.choice, 0) <= budget
    assert got.loss == total(drawn, got.choice, 1)
    # The solver takes a budget as met that is exceeded by its tolerance of 1e-6.
    want = loss_by_highs(drawn, budget - 1e-6)
    assert loss_by_highs(drawn, budget) - 1e-5 <= got.loss <= want + 1e-9


def test_a_larger_budget_never_loses_more() -> None:
    drawn = rough(random.Random(3), 20, 12)
    losses = [allocate(drawn, budget).loss for budget in range(0, 40, 2)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) > 10


def test_a_budget_without_bound_takes_the_least_loss_of_each_group() -> None:
    drawn = rough(random.Random(4), 20, 12)
    got = allocate(drawn, math.inf)
    assert got.loss == sum(min(loss for _, loss in group) for group in drawn)
    assert got == allocate(drawn, 10**400) == allocate(drawn, 2**62)


@pytest.mark.parametrize("exponent", [-900, 900])
def test_the_units_of_costs_and_losses_do_not_matter(exponent: int) -> None:
    draw = random.Random(5)
    drawn = [[(draw.random(), draw.gauss(0, 1)) for _ in range(8)] for _ in range(100)]
    want = allocate(drawn, 30.0)
    power = 2.0**exponent
    dear = [[(cost * power, loss) for cost, loss in group] for group in drawn]
    assert allocate(dear, 30.0 * power) == (want.choice, want.cost * power, want.loss)
    painful = [[(cost, loss * power) for cost, loss in group] for group in drawn]
    assert allocate(painful, 30.0) == (want.choice, want.cost, want.loss * power)


def test_of_equal_losses_the_lowest_cost_then_the_first_index_wins() -> None:
    assert allocate([[(3, 1.0), (2, 1.0), (2, 1.0)]], 5) == ((1,), 2, 1.0)
    group = [(1, 1.0), (0, 2.0), (1, 1.0), (0, 2.0)]
    assert allocate([group] * 3, 1) == ((0, 1, 1), 1, 5.0)
    assert allocate([group] * 3, 0) == ((1, 1, 1), 0, 6.0)


def test_no_group_costs_nothing() -> None:
    assert allocate([], 0) == ((), 0, 0.0)
    with pytest.raises(ValueError, match="budget: got -1, expected at least 0"):
        allocate([], -1)


def test_numpy_and_fractions_are_numbers_too() -> None:
    pairs = np.array([[0.0, 3.0], [0.5, 1.0]])
    assert allocate([pairs, pairs], np.float32(0.5)) == ((0, 1), 0.5, 4.0)  # type: ignore[list-item]
    whole = [(np.int64(2), np.float32(1)), (0, Fraction(3, 2))]
    got = allocate([whole], 7)  # type: ignore[list-item]
    assert got == ((0,), 2, 1.0)
    assert type(got.cost) is int


@pytest.mark.parametrize("budget", [Fraction(1, 3), Fraction(2, 3), 2**53 + 1, 2**53 + 3])
def test_a_budget_that_float64_does_not_hold_is_not_exceeded(budget: Any) -> None:
    nearest = float(budget)
    costs = (math.nextafter(nearest, 0), nearest, math.nextafter(nearest, math.inf))
    got = allocate([[(cost, -cost) for cost in costs]], budget)
    assert got.cost == max(cost for cost in costs if cost <= budget)


@pytest.mark.parametrize("size", [2**53, 2**60])
def test_whole_costs_beyond_float64_are_exact(size: int) -> None:
    options = [[(size, 1.0), (size + 1, 0.0)]] * 3
    assert allocate(options, 3 * size + 2) == ((0, 1, 1), 3 * size + 2, 1.0)
    assert allocate(options, 3 * size) == ((0, 0, 0), 3 * size, 3.0)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ([[(0, 1)], []], 1, r"options\[1\]: got no option"),
        ([[(0, 1)], [(0, math.nan)]], 1, r"options\[1\]\[0\] loss: got nan, expected a finite"),
        ([[(0, -math.inf)]], 1, r"options\[0\]\[0\] loss: got -inf"),
        ([[(0, 10**400)]], 1, r"options\[0\]\[0\] loss: got 1000"),
        ([[(0, 1), (math.nan, 1)]], 1, r"options\[0\]\[1\] cost: got nan"),
        ([[(math.inf, 1)]], 1, r"options\[0\]\[0\] cost: got inf"),
        ([[(-1, 1)]], 1, r"options\[0\]\[0\] cost: got -1, expected 0 or more"),
        ([[(-0.5, 1)]], 1, r"options\[0\]\[0\] cost: got -0.5, expected 0 or more"),
        ([[(3, 1), (2, 1)], [(5, 0)]], 6, "budget: got 6, expected at least 7, the least cost"),
        ([[(0.1, 1)]] * 3, 0.3, "expected at least 0.30000000000000004"),
        ([[(0, 1)]], -1, "budget: got -1, expected at least 0"),
        ([[(0, 1)]], math.nan, "budget: got nan"),
        ([[(2**62, 1)]] * 2, 1, "options: got costs up to 9223372036854775808"),
        ([[(0, 1e308)]] * 2, 1, "options: got totals that overflow"),
        ([[(1e308, 0)]] * 2, 1, "options: got totals that overflow"),
        ([[(10**308, 0)]] * 2 + [[(0.5, 0)]], 1, "options: got totals that overflow"),
        ([[(0, Fraction(10) ** 400)]], 1, r"options\[0\]\[0\] loss: got inf"),
    ],
)
def test_names_the_number_out_of_range(options: Any, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(options, budget)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ([[(0, 1), 5]], 1, r"options\[0\]\[1\]: got 5, expected \(cost, loss\)"),
        ([[(0, 1, 2)]], 1, r"options\[0\]\[0\]: got \(0, 1, 2\), expected \(cost, loss\)"),
        ([[(0, "1")]], 1, r"options\[0\]\[0\] loss: got str, expected a real number"),
        ([[(1j, 1)]], 1, r"options\[0\]\[0\] cost: got complex"),
        ([[(0, 1)]], "1", "budget: got str, expected a real number"),
    ],
)
def test_names_what_is_no_number(options: Any, budget: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        allocate(options, budget)


def test_what_outgrows_the_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of subsets: every partial choice lies on the relaxation."""
    draw = random.Random(0)
    subset = [[(0.0, 0.0), (weight, -weight)] for weight in (draw.random() for _ in range(40))]
    monkeypatch.setattr(module, "_MOST_CANDIDATES", 1000)
    with pytest.raises(ValueError, match=r"options: got 1\d\d\d partial choices at group 9, exp"):
        allocate(subset, 7.77)
