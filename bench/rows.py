"""What one measurement is, as it stands in out/results.json, and its small statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

KINDS = ("measured", "simulated", "emulated", "instructions", "bytes", "compiled", "recorded")


@dataclasses.dataclass
class Spread:
    """A sample told by its median and the values that 20 % and 80 % of it stay below."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        return cls(quantile(sample, 0.5), quantile(sample, 0.2), quantile(sample, 0.8))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor)


@dataclasses.dataclass
class RivalResult:
    """A rival in the row's unit; `ratio` above 1 means that ours is better by that factor.

    The ratios are paired, round by round, so that a slow spell of the machine cancels.
    A rival that could not be timed has `absent` instead: why, and how to get it.
    """

    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    error: float | None = None
    absent: str | None = None

    def pair(self, times: Sequence[float], own: Sequence[float], scale: float) -> None:
        """Takes the seconds of the same rounds, its own and ours; `scale` makes them the unit's."""
        spread = Spread.of(times).scaled(scale)
        ratios = Spread.of([theirs / mine for theirs, mine in zip(times, own, strict=True)])
        self.median, self.p20, self.p80 = spread.median, spread.p20, spread.p80
        self.ratio, self.ratio_p20, self.ratio_p80 = ratios.median, ratios.p20, ratios.p80


@dataclasses.dataclass
class LimitResult:
    """What the machine itself reached in the same rounds, as a rate."""

    name: str
    value: float
    unit: str


@dataclasses.dataclass
class Row:
    """One line of the results; `ours` is None where nothing (or nothing right) ran."""

    id: str
    vertical: str
    what: str
    unit: str
    threads: int
    ours: float | None = None
    p20: float | None = None
    p80: float | None = None
    rivals: dict[str, RivalResult] = dataclasses.field(default_factory=dict)
    ratio: float | None = None
    limit: LimitResult | None = None
    percent_of_limit: float | None = None
    error: float | None = None
    kind: str = "measured"
    target: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    met: bool | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def rank(self) -> None:
        """Takes the ratio to the nearest rival."""
        ratios = [rival.ratio for rival in self.rivals.values() if rival.ratio is not None]
        self.ratio = min(ratios) if ratios else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        data = dict(data)
        data["rivals"] = {name: RivalResult(**rival) for name, rival in data["rivals"].items()}
        data["limit"] = LimitResult(**data["limit"]) if data["limit"] else None
        return cls(**data)


def quantile(sample: Sequence[float], share: float) -> float:
    """The value below which `share` of the sample lies, linear between neighbours."""
    if not sample:
        raise ValueError("quantile of an empty sample")
    ordered = sorted(sample)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def upper_bound(sample: Sequence[float], confidence: float = 0.95) -> float:
    """One-sided upper confidence bound of the median.

    The k-th smallest value bounds the median with probability P(Binomial(n, 1/2) < k): exact
    for every distribution, so a few disturbed rounds widen it instead of breaking it. Too few
    values to reach the confidence (4 for 95 %) give infinity.
    """
    ordered = sorted(sample)
    count = len(ordered)
    below = 0.0
    for k in range(1, count + 1):
        below += math.comb(count, k - 1) * 0.5**count
        if below >= confidence:
            return ordered[k - 1]
    return math.inf
