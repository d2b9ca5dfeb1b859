"""What the contract says of a row."""

from pathlib import Path

import pytest

from quernstone.bench import targets
from quernstone.bench.rows import RivalResult, Row
from quernstone.bench.targets import BadTargets, Target
from tests.bench.fakes import targets_file


def _row(**values: object) -> Row:
    return Row("fake.sum.t1", "fake", "", "ms", 1, **values)  # type: ignore[arg-type]


def _target(measure: str, comparison: str, value: float, rival: str | None = None) -> Target:
    return Target("fake.sum.t1", measure, comparison, value, "words", rival)


@pytest.mark.parametrize(
    ("comparison", "value", "met"),
    [("<=", 2.0, True), ("<", 2.0, False), (">=", 2.0, True), (">", 2.0, False), ("<", 2.1, True)],
)
def test_the_comparison_decides_at_the_value_itself(
    comparison: str, value: float, met: bool
) -> None:
    assert _target("ours", comparison, value).judge(_row(ours=2.0))["met"] is met


def test_margin_is_positive_on_the_good_side() -> None:
    row = _row(ours=2.0, percent_of_limit=90.0)
    assert _target("ours", "<=", 4.0).judge(row)["margin"] == pytest.approx(50.0)
    assert _target("ours", "<=", 1.0).judge(row)["margin"] == pytest.approx(-100.0)
    assert _target("percent_of_limit", ">=", 80).judge(row)["margin"] == pytest.approx(12.5)


def test_a_ratio_is_to_the_named_rival() -> None:
    row = _row(ratio=1.1, rivals={"a": RivalResult(ratio=9.0), "b": RivalResult(ratio=1.1)})
    verdict = _target("ratio", ">=", 5, "a").judge(row)
    assert verdict["met"]
    assert verdict["measure"] == "ratio to a"


def test_a_ratio_of_the_best_fifths_is_not_paired() -> None:
    rivals = {"a": RivalResult(ratio=1.0, p20=6.0), "b": RivalResult(absent="pip install b")}
    row = _row(p20=2.0, rivals=rivals)
    verdict = _target("ratio_of_p20", ">=", 3, "a").judge(row)
    assert verdict["met"]
    assert verdict["got"] == 3.0
    assert verdict["measure"] == "ratio_of_p20 to a"
    assert _target("ratio_of_p20", ">=", 3, "b").judge(row)["got"] is None


def test_what_was_not_measured_is_not_met() -> None:
    row = _row(rivals={"a": RivalResult(absent="pip install a")})
    for target in (_target("ours", "<=", 1), _target("ratio", ">=", 1, "a")):
        verdict = target.judge(row)
        assert verdict["met"] is False
        assert verdict["got"] is None


def test_a_row_is_met_when_all_its_targets_are() -> None:
    row = _row(ours=2.0, error=0.5)
    targets.judge(row, [_target("ours", "<=", 2), _target("error", "<", 0.1)])
    assert [verdict["met"] for verdict in row.target] == [True, False]
    assert row.met is False


def test_a_row_without_targets_is_neither_met_nor_missed() -> None:
    row = _row(ours=2.0)
    targets.judge(row, [Target("fake.other", "ours", "<=", 1, "words")])
    assert row.target == []
    assert row.met is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("fake.a", "ours", "==", 1), "comparison '=='"),
        (("fake.a", "median", "<", 1), "measure 'median'"),
        (("fake.a", "ratio", "<", 1), "a ratio names its rival"),
        (("fake.a", "ours:a", "<", 1), "a ratio names its rival"),
    ],
)
def test_a_line_that_means_nothing_is_refused(
    tmp_path: Path, line: tuple[str, str, str, float], message: str
) -> None:
    with pytest.raises(BadTargets, match=message):
        targets.load(targets_file(tmp_path, line))


GOOD = 'id = "a"\nmeasure = "ours"\ncomparison = "<"\nvalue = 1\nwords = "small"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[targets]]\n" + GOOD, r"expected \[\[target\]\] tables"),
        ("target = 3", r"expected \[\[target\]\] tables"),
        ("target = [3]", "expected either id or ids"),
        ("[[target]]\n" + GOOD.replace('id = "a"\n', ""), "expected either id or ids"),
        ("[[target]]\n" + GOOD + 'ids = ["b"]\n', "expected either id or ids"),
        ("[[target]]\n" + GOOD.replace('id = "a"', 'ids = "abc"'), "expected a list of ids"),
        ("[[target]]\n" + GOOD.replace('words = "small"\n', ""), "words that are words"),
        ("[[target]]\n" + GOOD.replace("value = 1", 'value = "1"'), "got the value '1'"),
        ("[[target]]\n" + GOOD.replace("value = 1\n", ""), "got the value None"),
        ("[[target]]\n" + GOOD + 'colour = "red"\n', "got colour"),
        ("[[target]\n", "targets.toml: "),
    ],
)
def test_a_contract_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "targets.toml"
    path.write_text(text)
    with pytest.raises(BadTargets, match=message):
        targets.load(path)


def test_one_line_may_hold_for_several_rows(tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    path.write_text(
        '[[target]]\nids = ["a.x", "a.y"]\nmeasure = "ours"\ncomparison = "<"\nvalue = 1\n'
        'words = "small"\n'
    )
    assert [target.id for target in targets.load(path)] == ["a.x", "a.y"]


def test_the_contract_of_the_package_can_be_read() -> None:
    assert targets.load()
