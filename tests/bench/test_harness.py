"""Right first, then timed; rivals alternate with ours in the same rounds."""

import itertools
import math

import pytest

from quernstone.bench.harness import (
    Absent,
    Check,
    Limit,
    Pace,
    Rounds,
    Slope,
    SlopeRival,
    WrongResult,
)
from tests.bench.fakes import ALWAYS_RIGHT, Stage, measure

FIVE = Pace(seconds=0.0, least=5, most=5)
WRONG = Check(lambda _result: 1.0, 0.5)


def _timed(stage: Stage) -> list[str]:
    return stage.log[stage.log.index("|") + 1 :]


def test_rivals_and_ours_take_turns_in_going_first(stage: Stage) -> None:
    rounds = Rounds({"a": stage.work("a", 1.0)})
    for _ in range(4):
        rounds.before()
        stage.log.append("ours")
    rounds.finish()
    assert stage.log == ["a", "ours", "ours", "a", "a", "ours", "ours", "a"]


def test_every_round_begins_with_another_rival(stage: Stage) -> None:
    rounds = Rounds({name: stage.work(name, 1.0) for name in "abc"})
    for _ in range(3):
        rounds.before()
    rounds.finish()
    assert "".join(stage.log) == "abc" + "bca" + "cab"


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_each_rival_is_timed_once_a_round(stage: Stage, count: int) -> None:
    rounds = Rounds({"a": stage.work("a", 2.0), "b": stage.work("b", 3.0)})
    for _ in range(count):
        rounds.before()
    rounds.finish()
    assert rounds.times == {"a": [2.0] * count, "b": [3.0] * count}


def test_speed_pairs_ratios_and_share_of_the_limit(stage: Stage) -> None:
    fixture, benchmark = measure(stage)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 0.002),
        check=ALWAYS_RIGHT,
        rivals=[stage.rival("slow", 0.010), stage.rival("near", 0.003)],
        limit=Limit("peak", stage.work("limit", 0.001), work=4e6),
        work=6e6,
        pace=FIVE,
    )
    assert row.ours == pytest.approx(2.0)
    assert row.rivals["slow"].ratio == pytest.approx(5.0)
    assert row.rivals["near"].median == pytest.approx(3.0)
    assert row.ratio == pytest.approx(1.5)  # the nearest rival
    assert row.limit is not None
    assert row.limit.value == pytest.approx(4.0)  # GF/s
    assert row.percent_of_limit == pytest.approx(75.0)
    assert benchmark.extra_info["timed"]
    assert _timed(stage).count("ours") == _timed(stage).count("limit") == 5


def test_a_wrong_result_of_ours_is_never_timed(stage: Stage) -> None:
    fixture, benchmark = measure(stage)
    with pytest.raises(WrongResult, match=r"error 1, expected at most 0\.5"):
        fixture.speed(
            what="fake",
            ours=stage.work("ours", 1.0),
            check=WRONG,
            rivals=[stage.rival("a", 1.0)],
        )
    assert benchmark.timing == []
    assert stage.log == ["ours"]
    assert fixture.row.ours is None
    assert fixture.row.error == 1.0


def test_nan_is_a_wrong_result(stage: Stage) -> None:
    fixture, benchmark = measure(stage)
    check = Check(lambda _result: math.nan, 1.0)
    with pytest.raises(WrongResult):
        fixture.speed(what="fake", ours=stage.work("ours", 1.0), check=check)
    assert benchmark.timing == []


def test_a_wrong_rival_is_never_timed(stage: Stage) -> None:
    fixture, _ = measure(stage)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 1.0),
        check=ALWAYS_RIGHT,
        rivals=[stage.rival("liar", 1.0, WRONG), stage.rival("honest", 2.0)],
        pace=FIVE,
    )
    assert "liar" not in _timed(stage)
    assert row.rivals["liar"].ratio is None
    assert row.rivals["liar"].absent == "not timed: its error 1 is above 0.5"
    assert row.rivals["honest"].ratio == pytest.approx(2.0)


def test_a_rival_that_raises_is_named_with_its_reason(stage: Stage) -> None:
    def broken(_result: object) -> float:
        raise KeyError("no such op")

    fixture, _ = measure(stage)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 1.0),
        check=ALWAYS_RIGHT,
        rivals=[stage.rival("broken", 1.0, Check(broken, 1.0))],
        pace=FIVE,
    )
    assert row.rivals["broken"].absent == "not timed: KeyError: 'no such op'"
    assert row.ratio is None


def test_an_absent_rival_says_how_to_get_it(stage: Stage) -> None:
    fixture, _ = measure(stage)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 1.0),
        check=ALWAYS_RIGHT,
        rivals=[Absent("abacus", "pip install abacus")],
        pace=FIVE,
    )
    assert row.rivals["abacus"].absent == "pip install abacus"


def test_the_quick_form_does_not_wait_for_a_slow_rival(stage: Stage) -> None:
    fixture, _ = measure(stage, quick=True)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 0.1),
        check=ALWAYS_RIGHT,
        rivals=[stage.rival("slow", 9.0)],
    )
    assert row.rivals["slow"].absent == "left out of the quick form: 9.0 s a call"
    assert stage.log.count("slow") == 1


def test_short_calls_are_repeated_within_a_round(stage: Stage) -> None:
    fixture, _ = measure(stage)
    row = fixture.speed(
        what="fake",
        ours=stage.work("ours", 1e-6),
        check=ALWAYS_RIGHT,
        rivals=[stage.rival("a", 2e-6)],
        unit="us",
        calls=100,
        pace=FIVE,
    )
    assert row.ours == pytest.approx(1.0)
    assert row.rivals["a"].median == pytest.approx(2.0)
    assert _timed(stage).count("ours") == 500


def test_rounds_fit_the_time_within_their_bounds() -> None:
    pace = Pace(seconds=10.0, least=3, most=50)
    assert [pace.rounds(seconds) for seconds in (100.0, 1.0, 0.001, 0.0)] == [3, 10, 50, 50]


def test_a_slope_is_what_one_unit_more_costs_each(stage: Stage) -> None:
    fixture, _ = measure(stage)
    row = fixture.slope(
        what="a unit",
        ours=Slope(stage.work("less", 0.004), stage.work("more", 0.010), units=6),
        check=ALWAYS_RIGHT,
        rivals=[
            SlopeRival(
                "other",
                Slope(stage.work("its less", 0.100), stage.work("its more", 0.112), units=6),
                ALWAYS_RIGHT,
            ),
            Absent("gone", "pip install gone"),
        ],
        pace=FIVE,
    )
    assert row.ours == pytest.approx(1.0)
    assert row.rivals["other"].median == pytest.approx(2.0)
    assert row.rivals["other"].ratio == row.ratio == pytest.approx(2.0)
    assert row.rivals["gone"].absent == "pip install gone"
    timed = _timed(stage)
    assert {name: timed.count(name) for name in set(timed)} == {
        "rest": 20,
        "less": 5,
        "more": 5,
        "its less": 5,
        "its more": 5,
    }
    assert all(a == "rest" for a, b in itertools.pairwise(timed) if b != "rest")


def test_a_wrong_rival_has_no_slope(stage: Stage) -> None:
    fixture, _ = measure(stage)
    both = Slope(stage.work("less", 0.1), stage.work("more", 0.2), units=1)
    row = fixture.slope(
        what="a unit",
        ours=both,
        check=ALWAYS_RIGHT,
        rivals=[SlopeRival("other", both, WRONG)],
        pace=FIVE,
    )
    assert "not timed: its error 1" in (row.rivals["other"].absent or "")
    assert row.ratio is None


def test_relative_gives_the_upper_bound_of_the_paired_ratio(stage: Stage) -> None:
    fixture, _ = measure(stage)
    row = fixture.relative(
        what="overhead",
        ours=stage.work("ours", 1.005),
        base=stage.rival("plain", 1.0),
        check=ALWAYS_RIGHT,
        summary="upper95",
    )
    assert row.ours == pytest.approx(1.005)
    assert row.unit == "x"
    assert row.rivals == {}


def test_relative_refuses_a_wrong_base(stage: Stage) -> None:
    fixture, benchmark = measure(stage)
    with pytest.raises(WrongResult, match="plain"):
        fixture.relative(
            what="overhead",
            ours=stage.work("ours", 1.0),
            base=stage.rival("plain", 1.0, WRONG),
            check=ALWAYS_RIGHT,
        )
    assert benchmark.timing == []


def test_value_compares_with_rivals_in_the_better_direction(stage: Stage) -> None:
    smaller = measure(stage)[0].value(
        what="bytes", unit="MB", kind="bytes", compute=lambda: 2.0, rivals={"a": 8.0}
    )
    larger = measure(stage)[0].value(
        what="rate", unit="GB/s", compute=lambda: 8.0, rivals={"a": 2.0}, smaller_is_better=False
    )
    assert smaller.ratio == larger.ratio == 4.0
    assert smaller.kind == "bytes"


def test_a_benchmark_measures_one_row(stage: Stage) -> None:
    fixture, _ = measure(stage)
    fixture.value(what="a", unit="", compute=lambda: 1.0)
    with pytest.raises(RuntimeError, match="measures one row"):
        fixture.value(what="b", unit="", compute=lambda: 1.0)
