"""The command `quernstone moe`: what it says, what it writes, and how it ends."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from quernstone.cli import app
from quernstone.moe import MODELS, CostModel, ModelShape, Trace
from quernstone.moe import cost as module
from quernstone.plan import Plan


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["moe", *arguments], env={"COLUMNS": "200"})


def test_plans_a_layer_and_draws_it(tmp_path: Path) -> None:
    picture, data = tmp_path / "plan.svg", tmp_path / "plan.json"
    result = _call("plan", "--tokens", "16", "--cached", "0.5", "--out", str(picture))
    assert result.exit_code == 0, result.output
    for policy in ("fixed", "event", "hybrid", "exact"):
        assert policy in result.output
    assert "simulated" in result.output
    assert picture.read_text().startswith("<svg")
    assert _call("plan", "--out", str(data)).exit_code == 0
    plan = Plan.load(data)
    assert plan.makespan > 0
    assert "deepseek-v2-lite" in plan.title


def test_profiles_and_takes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(module, "TOKENS", (1, 4))
    monkeypatch.setitem(MODELS, "deepseek-v2-lite", ModelShape(64, 32, 8, 2, 1))  # type: ignore[arg-type]
    path = tmp_path / "folder" / "costs.json"
    result = _call("profile", "--gpu", "h100", "--threads", "1", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert "CPU measured, GPU and bus assumed" in result.output
    assert CostModel.load(path).cpu_source == "measured"
    planned = _call("plan", "--costs", str(path))
    assert planned.exit_code == 0, planned.output
    assert "h100" in planned.output
    other = _call("plan", "--costs", str(path), "--model", "mixtral-8x7b")
    assert other.exit_code == 2
    assert "got experts of 64 by 32, expected 4096 by 14336" in other.output


def test_simulates_a_trace_from_a_file(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).dirichlet(np.full(8, 0.3), (2, 50)).astype(np.float32)
    Trace.of(scores, 2).save(tmp_path / "t.npz")
    out = tmp_path / "step.svg"
    result = _call("simulate", "--trace", str(tmp_path / "t.npz"), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "belady" in result.output
    assert "hit rate" in result.output
    assert out.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--model", "gpt-5"), "--model: got 'gpt-5', expected one of mixtral-8x7b"),
        (("plan", "--costs", "abacus"), "--costs: got 'abacus'"),
        (("plan", "--policy", "luck"), "--policy: got 'luck'"),
        (("plan", "--out", "plan.png"), "--out: got plan.png"),
        (("simulate", "--trace", "nowhere"), "--trace: got 'nowhere'"),
        (("plan", "--tokens", "9" * 20), "'--tokens'"),
        (("plan", "--seed", "-1"), "'--seed'"),
        (("simulate", "--cache", "luck"), "--cache: got 'luck'"),
        (("profile", "--gpu", "abacus"), "abacus"),
        (("profile", "--format", "fp4"), "fp4"),
    ],
)
def test_a_wrong_argument_ends_with_two_and_a_line(arguments: tuple[str, ...], words: str) -> None:
    result = _call(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    if words.startswith("--"):
        assert len(result.output.splitlines()) == 1


def test_a_damaged_file_ends_with_two_and_a_line(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"format": "x"}))
    result = _call("plan", "--costs", str(path))
    assert result.exit_code == 2
    assert "costs.json" in result.output
