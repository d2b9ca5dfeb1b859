"""Which option each group takes when they share one budget: the multiple-choice knapsack, exactly.

Cache slots of layers, bit widths of tensors, ranks, shifts: each group has options that cost
something and lose something.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from numbers import Real
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernstone._checks import number

# About a gigabyte of candidates.
_MOST_CANDIDATES = 1 << 24

_Numbers = NDArray[Any]
"""Costs are int64 or float64, losses float64, indices int64."""


class Allocation(NamedTuple):
    """One option of each group."""

    choice: tuple[int, ...]
    """The index of the option that each group takes."""
    cost: float
    """What they cost together; an int where all costs are."""
    loss: float
    """What they lose together."""


def allocate(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> Allocation:
    """Takes one option of each group so that the total loss is least within a budget.

    Totals are added up from the first group to the last, in int64 where all costs are ints and in
    float64 otherwise, and it is these totals, roundings included, that the promise speaks of:
    floating costs that ought to fill the budget to the last bit need a budget that much larger. Of
    equal losses the lowest cost is taken, and of equal costs the lowest index of the first group
    where they differ. (Where totals round, equals may arise that the indices do not decide; the
    result is the same in every run.)

    Partial choices are extended group by group. One is dropped where another of the same groups
    costs and loses no more, which rounding respects since it is monotone, and where the linear
    relaxation of the remaining groups cannot make it as good as a choice already known. The time
    is at most proportional to groups * options * budget for whole costs; for floating costs it
    has no such bound, and inputs such as sums of subsets, where many choices lie at the relaxation,
    are refused when they outgrow the memory.

    Args:
        options: for each group its options as pairs (cost, loss). Costs are finite and 0 or more,
            losses finite, of any sign.
        budget: what the costs may come to, any number or infinity.

    Returns:
        Allocation(choice, cost, loss).

    Raises:
        ValueError: a group without options, a number out of its range, a budget below the least
            cost possible, more than 2**24 partial choices left to extend.
        TypeError: an option is no pair of real numbers, the budget no real number.

    Source: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11: dominance, and the
    relaxation of Sinha and Zoltners (1979). Oracles: all choices; HiGHS through scipy's milp.
    """
    groups = _read(options)
    limit, most = _limit(groups, budget)
    scale = _Scale.of(groups, most)
    rests = _relaxations(groups, scale)

    cost = np.zeros(1, groups[0].cost.dtype if groups else np.int64)
    loss = np.zeros(1)
    known = math.inf
    trail: list[tuple[_Numbers, _Numbers]] = []
    for index, (group, rest) in enumerate(zip(groups, rests, strict=True)):
        width = len(group.cost)
        if len(cost) * width > _MOST_CANDIDATES:
            raise ValueError(
                f"options: got {len(cost) * width} partial choices at group {index}, expected at "
                f"most {_MOST_CANDIDATES}; costs rounded to whole numbers leave fewer"
            )
        # Candidates stand in the order of their choices, so that the first of equals wins.
        cost = np.add.outer(cost, group.cost).ravel()
        loss = np.add.outer(loss, group.loss).ravel()
        taken = np.flatnonzero(cost <= limit)
        room, so_far = scale.costs(limit - cost[taken]), scale.losses(loss[taken])
        known = min(known, rest.rounded(room - scale.cost_slack, so_far))
        room += scale.cost_slack
        hopeful = so_far + rest.relaxed(room) <= known + scale.loss_slack
        taken = taken[hopeful & (room >= rest.cost[0])]
        taken = taken[_pareto(cost[taken], loss[taken])]
        cost, loss = cost[taken], loss[taken]
        trail.append((taken // width, group.index[taken % width]))

    last = at = int(np.argmin(loss))
    choice = []
    for parent, option in reversed(trail):
        choice.append(int(option[at]))
        at = int(parent[at])
    return Allocation(tuple(reversed(choice)), cost[last].item(), loss[last].item())


@dataclass(frozen=True)
class _Group:
    """The options of a group that no other one dominates, in their order."""

    cost: _Numbers
    loss: _Numbers
    index: _Numbers


class _Scale(NamedTuple):
    """Bounds are found for totals below 1: powers of two are taken out of costs and losses.

    The slack is how far a bound may be off, since it adds the same numbers up in another order. A
    sum of k terms is off by at most k u times the sum of their sizes, u = eps / 2; a bound and what
    it is compared with take four such sums, and the convex hulls one more. What underflows on this
    scale is far below the slack. Whole costs that float64 holds need none.
    """

    cost_exponent: int
    loss_exponent: int
    cost_slack: float
    loss_slack: float

    @classmethod
    def of(cls, groups: Sequence[_Group], most: float) -> "_Scale":
        size = math.fsum(float(np.abs(group.loss).max()) for group in groups)
        terms = 1 + sum(len(group.cost) for group in groups)
        slack = 4 * terms * float(np.finfo(np.float64).eps)
        exact = isinstance(most, int) and most < 2**53
        return cls(math.frexp(most)[1], math.frexp(size)[1], 0.0 if exact else slack, slack)

    def costs(self, costs: _Numbers) -> _Numbers:
        return np.ldexp(costs.astype(np.float64), -self.cost_exponent)

    def losses(self, losses: _Numbers) -> _Numbers:
        return np.ldexp(losses, -self.loss_exponent)


class _Rest(NamedTuple):
    """The linear relaxation of the groups yet to come: least loss as a convex function of cost.

    Its corners are choices themselves: each group at a corner of its own hull.
    """

    cost: _Numbers
    loss: _Numbers

    def relaxed(self, room: _Numbers) -> _Numbers:
        """No choice that fits the room loses less."""
        return np.interp(room, self.cost, self.loss)

    def rounded(self, room: _Numbers, loss: _Numbers) -> float:
        """The least total of `loss` and the best corner that fits the room."""
        corner = np.searchsorted(self.cost, room, side="right") - 1
        fits = corner >= 0
        return float(np.min(loss[fits] + self.loss[corner[fits]], initial=math.inf))


def _relaxations(groups: Sequence[_Group], scale: _Scale) -> list[_Rest]:
    """For each group the relaxation of those after it, by `scale`."""
    hulls = [_hull(scale.costs(group.cost), scale.losses(group.loss)) for group in groups]
    steps = [(*step, at) for at, hull in enumerate(hulls) for step in _steps(hull)]
    steps.sort(key=lambda step: step[0])
    more, change, owner = (np.array([step[field] for step in steps]) for field in (1, 2, 3))
    cost = loss = 0.0
    rests = []
    for at in reversed(range(len(groups))):
        later = owner > at
        costs, losses = np.append(cost, more[later]), np.append(loss, change[later])
        rests.append(_Rest(np.cumsum(costs), np.cumsum(losses)))
        cost, loss = cost + hulls[at][0][0], loss + hulls[at][0][1]
    return rests[::-1]


def _hull(cost: _Numbers, loss: _Numbers) -> list[tuple[float, float]]:
    """Corners (cost, loss) of the lower convex hull of options none of which dominates another.

    The slopes between them rise strictly as computed, whatever they round to, so that the steps of
    a group stay in their order when those of all groups are sorted.
    """
    corners: list[tuple[float, float]] = []
    for at in np.argsort(cost):
        point = float(cost[at]), float(loss[at])
        while len(corners) > 1 and _slope(*corners[-2:]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    run = b[0] - a[0]
    return (b[1] - a[1]) / run if run else -math.inf


def _steps(hull: list[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """(slope, more cost, change of loss) from corner to corner."""
    return [(_slope(a, b), b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]


def _pareto(cost: _Numbers, loss: _Numbers) -> _Numbers:
    """Indices, rising, of what nothing else dominates; of equals the first."""
    order = np.lexsort((loss, cost))
    lowest = np.minimum.accumulate(loss[order])
    best = np.ones(len(order), dtype=np.bool_)
    best[1:] = loss[order[1:]] < lowest[:-1]
    return np.sort(order[best])


def _read(options: Iterable[Iterable[tuple[float, float]]]) -> list[_Group]:
    pairs = [_pairs(f"options[{at}]", group) for at, group in enumerate(options)]
    whole = all(isinstance(cost, int) for group in pairs for cost, _ in group)
    dearest = [max(cost for cost, _ in group) for group in pairs]
    if whole and sum(dearest) >= 2**63:
        raise ValueError(f"options: got costs up to {sum(dearest)}, expected below 2**63 in total")
    # As floats, since a sum of ints may be beyond them all.
    most = sum(map(float, dearest))
    if not math.isfinite(most + sum(max(abs(loss) for _, loss in group) for group in pairs)):
        raise ValueError("options: got totals that overflow, expected them to fit float64")
    groups = []
    for group in pairs:
        cost = np.array([cost for cost, _ in group], np.int64 if whole else np.float64)
        loss = np.array([loss for _, loss in group], np.float64)
        best = _pareto(cost, loss)
        groups.append(_Group(cost[best], loss[best], best))
    return groups


def _pairs(where: str, group: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The options of a group, losses as floats."""
    pairs: list[tuple[float, float]] = []
    for at, option in enumerate(group):
        try:
            cost, loss = option
        except (TypeError, ValueError):
            raise TypeError(f"{where}[{at}]: got {option!r}, expected (cost, loss)") from None
        cost, loss = number(f"{where}[{at}] cost", cost), number(f"{where}[{at}] loss", loss)
        if cost < 0:
            raise ValueError(f"{where}[{at}] cost: got {cost}, expected 0 or more")
        pairs.append((cost, float(loss)))
    if not pairs:
        raise ValueError(f"{where}: got no option, expected one at least")
    return pairs


def _limit(groups: Sequence[_Group], budget: Any) -> tuple[float, float]:
    """The budget in the type of the costs, no more than the dearest choice, which is second."""
    if not isinstance(budget, Real):
        raise TypeError(f"budget: got {type(budget).__name__}, expected a real number")
    if budget != budget:
        raise ValueError("budget: got nan, expected a number or infinity")
    # As the totals are added, which `sum` does not do.
    least = reduce(add, (group.cost.min().item() for group in groups), 0)
    most: Any = reduce(add, (group.cost.max().item() for group in groups), 0)
    if least > budget:
        raise ValueError(
            f"budget: got {budget}, expected at least {least}, the least cost possible"
        )
    limit: Any = min(budget, most)
    if isinstance(most, int):
        return math.floor(limit), most
    nearest = float(limit)
    return nearest if nearest <= limit else math.nextafter(nearest, 0.0), most
