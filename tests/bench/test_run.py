"""A run from benchmark files to rows, with files that a new vertical would add."""

import json
import os
from pathlib import Path

import pytest

from quernstone.bench import run
from quernstone.bench.plugin import Events, Selection
from quernstone.bench.rows import KINDS, Row
from tests.bench.fakes import bench_file, targets_file

ALL = Selection()
BROKEN = """
    from quernstone.bench.harness import Check, Named, rows

    @rows(Named("fake.wrong"))
    def bench_wrong(case, measure):
        measure.speed(what="lie", ours=lambda: 1, check=Check(lambda result: 7.0, 0.5))

    @rows(Named("fake.crash"))
    def bench_crash(case, measure):
        raise OSError("the disk is gone")

    @rows(Named("fake.wide", threads=4096))
    def bench_wide(case, measure):
        raise AssertionError("never reached")

    @rows(Named("fake.after"))
    def bench_after(case, measure):
        measure.value(what="runs all the same", unit="", compute=lambda: 1.0)
"""


def _run(folder: Path, selection: Selection = ALL, *, text: str | None = None) -> run.Results:
    path = bench_file(folder, text) if text else bench_file(folder)
    targets = folder / "targets.toml"
    if not targets.exists():
        targets.write_text("")
    return run.run([path], selection, targets_path=targets)


def _ids(results: run.Results) -> list[str]:
    return [row.id for row in results.rows]


def test_a_file_is_all_that_a_vertical_adds(tmp_path: Path) -> None:
    bench_file(tmp_path)
    assert run.verticals(tmp_path) == ["fake"]
    assert _ids(_run(tmp_path)) == ["fake.sum.t1", "fake.sum.t2", "fake.bytes"]


def test_ids_are_the_same_in_every_run(tmp_path: Path) -> None:
    assert _ids(_run(tmp_path)) == _ids(_run(tmp_path))


def test_saved_rows_have_the_schema(tmp_path: Path) -> None:
    results = _run(tmp_path)
    path = tmp_path / "out" / "results.json"
    results.save(path)
    data = json.loads(path.read_text())
    assert data["machine"]["cores"] >= 1
    assert [Row.from_json(row) for row in data["rows"]] == results.rows
    by_id = {row["id"]: row for row in data["rows"]}
    timed = by_id["fake.sum.t1"]
    assert timed["vertical"] == "fake"
    assert timed["p20"] <= timed["ours"] <= timed["p80"]
    assert timed["rivals"]["listed"]["ratio"] > 0
    assert "pip install abacus" in timed["rivals"]["abacus"]["absent"]
    assert "torch" in timed["versions"]
    assert by_id["fake.bytes"]["kind"] == "bytes"
    assert {row["kind"] for row in data["rows"]} <= set(KINDS)


def test_pytest_benchmark_keeps_the_row_beside_its_statistics(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    (tmp_path / "targets.toml").write_text("")
    run.run([bench_file(tmp_path)], ALL, targets_path=tmp_path / "targets.toml", json_path=path)
    saved = {bench["param"]: bench for bench in json.loads(path.read_text())["benchmarks"]}
    info = saved["fake.sum.t1"]["extra_info"]
    assert info["id"] == "fake.sum.t1"
    assert info["timed"] is True
    assert "timed" not in saved["fake.bytes"]["extra_info"]


def test_quick_takes_the_quick_rows(tmp_path: Path) -> None:
    assert _ids(_run(tmp_path, Selection(quick=True))) == ["fake.sum.t1", "fake.bytes"]


def test_only_takes_rows_by_their_beginning(tmp_path: Path) -> None:
    assert _ids(_run(tmp_path, Selection(only=("fake.sum",)))) == ["fake.sum.t1", "fake.sum.t2"]
    with pytest.raises(ValueError, match="no row was selected"):
        _run(tmp_path, Selection(only=("fake.su",)))


def test_targets_run_alone_and_are_judged(tmp_path: Path) -> None:
    targets_file(
        tmp_path, ("fake.sum.t1", "ratio:listed", ">=", 1e6), ("fake.bytes", "ours", "<=", 3)
    )
    results = _run(tmp_path, Selection(targets_only=True))
    assert {row.id: row.met for row in results.rows} == {"fake.sum.t1": False, "fake.bytes": True}
    assert [row.id for row in results.missed] == ["fake.sum.t1"]


def test_a_target_without_a_row_is_an_error(tmp_path: Path) -> None:
    targets_file(tmp_path, ("fake.forgotten", "ours", "<=", 3))
    with pytest.raises(ValueError, match=r"no benchmark produces: fake\.forgotten"):
        _run(tmp_path, Selection(quick=True))


def test_targets_of_verticals_that_do_not_run_are_left_alone(tmp_path: Path) -> None:
    targets_file(tmp_path, ("other.row", "ours", "<=", 3))
    assert _run(tmp_path).troubles == []


def test_two_rows_with_one_id_are_an_error(tmp_path: Path) -> None:
    text = """
        from quernstone.bench.harness import Named, rows

        @rows(Named("fake.same"))
        def bench_one(case, measure): ...

        @rows(Named("fake.same"))
        def bench_two(case, measure): ...
    """
    with pytest.raises(ValueError, match=r"share the row id fake\.same"):
        _run(tmp_path, text=text)


def test_trouble_in_one_row_leaves_the_others(tmp_path: Path) -> None:
    results = _run(tmp_path, text=BROKEN)
    rows = {row.id: row for row in results.rows}
    assert rows["fake.wrong"].ours is None
    assert rows["fake.wrong"].error == 7.0
    assert rows["fake.crash"].notes == ["failed: OSError: the disk is gone"]
    assert "4096 cores" in rows["fake.wide"].notes[0]
    assert rows["fake.after"].ours == 1.0
    assert [trouble.split(":")[0] for trouble in results.troubles] == ["fake.wrong", "fake.crash"]


def test_a_file_that_cannot_be_read_is_trouble(tmp_path: Path) -> None:
    results = _run(tmp_path, text="import no_such_module_anywhere")
    assert results.rows == []
    assert "no_such_module_anywhere" in results.troubles[0]


def test_options_for_the_tests_of_another_project_do_not_reach_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = _ids(_run(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing --bogus")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert _ids(_run(tmp_path)) == want
    assert os.environ["PYTEST_ADDOPTS"] == "-k nothing --bogus"
    assert not (tmp_path / ".benchmarks").exists()


def test_events_tell_what_runs(tmp_path: Path) -> None:
    heard: list[object] = []
    events = Events(heard.append, heard.append, lambda row: heard.append(f"{row.id} done"))
    (tmp_path / "targets.toml").write_text("")
    run.run(
        [bench_file(tmp_path)],
        Selection(quick=True),
        targets_path=tmp_path / "targets.toml",
        events=events,
    )
    expected = [2, "fake.sum.t1", "fake.sum.t1 done", "fake.bytes", "fake.bytes done"]
    assert heard == expected


def test_a_vertical_without_a_file_is_named() -> None:
    with pytest.raises(ValueError, match="no benchmarks for weather; there are some for attention"):
        run.files(["weather"])


def test_every_promise_of_the_package_has_a_row() -> None:
    with pytest.raises(ValueError, match="no row was selected"):
        run.run(run.files([]), Selection(only=("nothing.at.all",)))
