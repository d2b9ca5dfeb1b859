"""How a row is measured: right first, then ours and the rivals in alternating rounds.

A bench file holds functions `bench_*(case, measure)` under `@rows(case, ...)`; a case has an
`id`, `threads` and `quick`. The function calls one method of `measure`, once: `speed` (a time
beside rivals and a limit), `slope` (what one unit more costs each of them), `relative` (a paired
ratio of two calls) or `value` (anything else).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import pytest

from quernstone.bench.rows import LimitResult, RivalResult, Row, Spread, quantile, upper_bound

Run = Callable[[], Any]
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


class Case(Protocol):
    """What a row needs of its case: a stable name, its threads, and whether `--quick` has it."""

    @property
    def id(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def quick(self) -> bool: ...


@dataclass(frozen=True)
class Named:
    """A case without shapes."""

    id: str
    threads: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Check:
    """A result is right where `error(result)` is at most `tolerance`."""

    error: Callable[[Any], float]
    tolerance: float


@dataclass(frozen=True)
class Rival:
    name: str
    run: Run
    check: Check
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slope:
    """Two calls, of which `more` does `units` of the work in question more than `less`."""

    less: Run
    more: Run
    units: float


@dataclass(frozen=True)
class SlopeRival:
    """A rival whose every call carries other work as well, which cancels between two of them."""

    name: str
    slope: Slope
    check: Check
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Absent:
    """A rival or a model that is not here; `why` holds the command that brings it."""

    name: str
    why: str


@dataclass(frozen=True)
class Limit:
    """Work that the machine does as fast as it can, timed in the same rounds as ours."""

    name: str
    run: Run
    work: float
    unit: str = "GF/s"


class WrongResult(AssertionError):
    """Ours disagrees with the reference, so there is nothing to time."""


def distance(chosen: float | None, used: float) -> float:
    """Of what is in use from what was chosen again.

    Raises:
        WrongResult: nothing was good enough to be chosen.
    """
    if chosen is None:
        raise WrongResult(f"{used:g} is in use, of all that was looked at nothing is enough")
    return abs(chosen - used)


def rows(*cases: Case) -> pytest.MarkDecorator:
    """One benchmark per case, named by the case's id."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases])


class Rounds:
    """Times the peers in the set-up of our rounds.

    They run before ours in even rounds and after ours in odd ones, each round beginning with
    another peer: nobody owns the warm cache or the first slot of a boost clock.
    """

    def __init__(self, peers: dict[str, Run], rest: float = 0.0):
        self.times: dict[str, list[float]] = {name: [] for name in peers}
        self._rest = rest
        self._peers = peers
        self._index = 0
        self._turn = 0
        self._owed = False

    def before(self) -> None:
        self.finish()
        if self._index % 2:
            self._owed = True
        else:
            self._time_peers()
        self._index += 1
        time.sleep(self._rest)

    def finish(self) -> None:
        """Times the peers of an odd last round, which no later set-up would."""
        if self._owed:
            self._owed = False
            self._time_peers()

    def _time_peers(self) -> None:
        names = list(self._peers)
        turn = self._turn % max(1, len(names))
        self._turn += 1
        for name in names[turn:] + names[:turn]:
            run = self._peers[name]
            time.sleep(self._rest)
            start = time.perf_counter()
            run()
            self.times[name].append(time.perf_counter() - start)


@dataclass
class Pace:
    """How long a row may take: as many rounds as fit the seconds, within the two bounds."""

    seconds: float
    least: int
    most: int

    def rounds(self, seconds_per_round: float) -> int:
        fitting = int(self.seconds / max(seconds_per_round, 1e-9))
        return max(self.least, min(self.most, fitting))


FULL = Pace(seconds=15.0, least=5, most=41)
QUICK = Pace(seconds=2.5, least=3, most=15)
# A first call this long is no worse a guide to the number of rounds than a second one.
WARM_ENOUGH = 1.0
# Seconds a call that the quick form waits for a rival.
PATIENCE = 2.0
# Seconds after which a pool of threads has given up spinning.
REST = 0.005
# A paired ratio that is to be known within a fraction of a percent needs many rounds.
FULL_PAIRED = Pace(seconds=45.0, least=40, most=400)
QUICK_PAIRED = Pace(seconds=6.0, least=20, most=100)


class Measure:
    """The fixture `measure`: fills one row through one pytest-benchmark benchmark."""

    def __init__(self, benchmark: Any, case: Case, quick: bool = False):
        self.quick = quick
        self.panels: list[tuple[str, str, str]] = []
        self.row = Row(
            id=case.id, vertical=case.id.split(".")[0], what="", unit="", threads=case.threads
        )
        self._benchmark = benchmark
        self._used = False

    def speed(
        self,
        *,
        what: str,
        ours: Run,
        check: Check,
        rivals: Sequence[Rival | Absent] = (),
        limit: Limit | None = None,
        work: float | None = None,
        moved: float | None = None,
        unit: str = "ms",
        calls: int = 1,
        notes: Iterable[str] = (),
        pace: Pace | None = None,
        patience: float = PATIENCE,
    ) -> Row:
        """Times `ours` and the rivals on the same inputs.

        Args:
            work: operations (of the limit's kind) in one call, for rate and % of limit.
            moved: bytes that one call has to read and write at least, for the roofline.
            calls: how often a round repeats a call that is too short to be timed alone.
            patience: seconds a call above which the quick form leaves a rival out.
        """
        row = self._begin(what, unit, notes)
        if work is not None:
            row.work["operations"] = work
        if moved is not None:
            row.work["bytes"] = moved
        seconds = self._verify(ours, check)
        peers: dict[str, Run] = {}
        for rival in rivals:
            rival_seconds = self._admit(rival, patience)
            if isinstance(rival, Rival) and rival_seconds is not None:
                peers[rival.name] = _repeat(rival.run, calls)
                seconds += rival_seconds
        timed = dict(peers)
        if limit is not None:
            timed["limit"] = limit.run
            seconds += warm_seconds(limit.run)
        pace = pace or (QUICK if self.quick else FULL)
        own, times = self._rounds(
            _repeat(ours, calls), timed, pace.rounds(seconds * calls), per=calls
        )
        scale = PER_SECOND[unit]
        self._set(Spread.of(own).scaled(scale))
        for name in peers:
            row.rivals[name].pair([t / calls for t in times[name]], own, scale)
        row.rank()
        if limit is not None and work is not None:
            rates = [limit.work / t for t in times["limit"]]
            row.limit = LimitResult(limit.name, quantile(rates, 0.5) / 1e9, limit.unit)
            shares = [work / mine / rate for mine, rate in zip(own, rates, strict=True)]
            row.percent_of_limit = 100 * quantile(shares, 0.5)
        return row

    def slope(
        self,
        *,
        what: str,
        ours: Slope,
        check: Check,
        rivals: Sequence[SlopeRival | Absent],
        unit: str = "ms",
        notes: Iterable[str] = (),
        pace: Pace | None = None,
    ) -> Row:
        """Tells what a unit of work costs: the difference of two calls, by their rounds.

        All calls of a round begin `REST` seconds after the one before, when the threads of a
        peer no longer spin. `check` sees the result of `more`.
        """
        row = self._begin(what, unit, notes)
        seconds = self._verify(ours.more, check)
        calls = {"": ours.less}
        slopes = {"": ours}
        for rival in rivals:
            if isinstance(rival, Absent):
                row.rivals[rival.name] = RivalResult(absent=rival.why)
                continue
            more = Rival(rival.name, rival.slope.more, rival.check, rival.versions)
            rival_seconds = self._admit(more)
            if rival_seconds is not None:
                seconds += rival_seconds
                slopes[rival.name] = rival.slope
                calls[f"{rival.name} less"] = rival.slope.less
                calls[f"{rival.name} more"] = rival.slope.more
        pace = pace or (QUICK_PAIRED if self.quick else FULL_PAIRED)
        rounds = pace.rounds(2 * (seconds + REST * len(slopes)))
        own, times = self._rounds(ours.more, calls, rounds, rest=REST)
        times[" more"], times[" less"] = own, times.pop("")
        each = {
            name: [
                (more - less) / slope.units
                for more, less in zip(times[f"{name} more"], times[f"{name} less"], strict=True)
            ]
            for name, slope in slopes.items()
        }
        scale = PER_SECOND[unit]
        mine = each.pop("")
        self._set(Spread.of(mine).scaled(scale))
        for name, theirs in each.items():
            row.rivals[name].pair(theirs, mine, scale)
        row.rank()
        row.notes.append(f"{rounds} paired rounds")
        return row

    def relative(
        self,
        *,
        what: str,
        ours: Run,
        base: Rival,
        check: Check,
        scale: float = 1.0,
        summary: Literal["median", "upper95"] = "median",
        notes: Iterable[str] = (),
        pace: Pace | None = None,
    ) -> Row:
        """Tells ours / base x `scale`, paired by rounds; `upper95` bounds its median from above."""
        row = self._begin(what, "x", notes)
        seconds = self._verify(ours, check)
        base_seconds = self._admit(base)
        if base_seconds is None:
            raise WrongResult(f"{base.name}: {row.rivals[base.name].absent}")
        pace = pace or (QUICK_PAIRED if self.quick else FULL_PAIRED)
        rounds = pace.rounds(seconds + base_seconds)
        own, times = self._rounds(ours, {base.name: base.run}, rounds)
        ratios = [scale * a / b for a, b in zip(own, times[base.name], strict=True)]
        self._set(Spread.of(ratios))
        if summary == "upper95":
            row.notes.append(f"median {row.ours:.4f}; ours is its upper 95 % bound")
            row.ours = upper_bound(ratios)
        row.notes.append(f"{rounds} paired rounds; {quantile(own, 0.5) * 1e3:.3g} ms a call")
        row.rivals.clear()
        return row

    def value(
        self,
        *,
        what: str,
        unit: str,
        compute: Callable[[], float | Spread],
        kind: str = "measured",
        rivals: dict[str, float] | None = None,
        smaller_is_better: bool = True,
        notes: Iterable[str] = (),
    ) -> Row:
        """Records what `compute` returns: bytes, an error, a count, a rate."""
        row = self._begin(what, unit, notes)
        row.kind = kind
        result = self._benchmark.pedantic(compute, rounds=1, iterations=1)
        spread = result if isinstance(result, Spread) else Spread(result, result, result)
        self._set(spread)
        for name, other in (rivals or {}).items():
            top, bottom = (other, spread.median) if smaller_is_better else (spread.median, other)
            ratio = top / bottom if bottom else None
            row.rivals[name] = RivalResult(median=other, ratio=ratio)
        row.rank()
        return row

    def absent(self, *, what: str, unit: str, missing: Absent) -> NoReturn:
        """Says that the row cannot be measured here, and why."""
        row = self._begin(what, unit, ())
        row.notes.append(f"{missing.name}: {missing.why}")
        pytest.skip(missing.why)

    def panel(self, title: str, svg: str, caption: str) -> None:
        """Adds a figure of the vertical's own to the page: an <svg>, or some of them in a <div>."""
        self.panels.append((title, svg, caption))

    def _begin(self, what: str, unit: str, notes: Iterable[str]) -> Row:
        if self._used:
            raise RuntimeError(f"{self.row.id}: a benchmark measures one row")
        self._used = True
        self.row.what, self.row.unit = what, unit
        self.row.notes.extend(notes)
        return self.row

    def _verify(self, ours: Run, check: Check) -> float:
        start = time.perf_counter()
        result = ours()
        first = time.perf_counter() - start
        self.row.error = check.error(result)
        if not self.row.error <= check.tolerance:
            raise WrongResult(
                f"{self.row.id}: error {self.row.error:.3g}, expected at most {check.tolerance:.3g}"
            )
        return warm_seconds(ours, first)

    def _admit(self, rival: Rival | Absent, patience: float = math.inf) -> float | None:
        """Seconds of a call of a rival that is right, else None and a word in the row."""
        result = self.row.rivals[rival.name] = RivalResult()
        if isinstance(rival, Absent):
            result.absent = rival.why
            return None
        self.row.versions.update(rival.versions)
        start = time.perf_counter()
        try:
            outcome = rival.run()
            first = time.perf_counter() - start
            result.error = rival.check.error(outcome)
        except Exception as error:
            # A rival may raise anything; it is reported in the row, not hidden.
            result.absent = f"not timed: {type(error).__name__}: {error}"[:300]
            return None
        if not result.error <= rival.check.tolerance:
            result.absent = (
                f"not timed: its error {result.error:.3g} is above {rival.check.tolerance:.3g}"
            )
            return None
        seconds = warm_seconds(rival.run, first)
        if self.quick and seconds > patience:
            result.absent = f"left out of the quick form: {seconds:.1f} s a call"
            return None
        return seconds

    def _rounds(
        self, ours: Run, peers: dict[str, Run], rounds: int, per: int = 1, rest: float = 0.0
    ) -> tuple[list[float], dict[str, list[float]]]:
        timer = Rounds(peers, rest)
        self._benchmark.pedantic(ours, setup=timer.before, rounds=rounds, iterations=1)
        timer.finish()
        self._benchmark.extra_info["timed"] = True
        self.row.work["rounds"] = rounds
        own = [seconds / per for seconds in self._benchmark.stats.stats.data]
        return own, timer.times

    def _set(self, spread: Spread) -> None:
        self.row.ours, self.row.p20, self.row.p80 = spread.median, spread.p20, spread.p80


def _repeat(run: Run, calls: int) -> Run:
    if calls == 1:
        return run

    def loop() -> None:
        for _ in range(calls):
            run()

    return loop


def warm_seconds(run: Run, first: float = 0.0) -> float:
    """Seconds of a second call, or of the first where that was long enough to tell."""
    if first > WARM_ENOUGH:
        return first
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
