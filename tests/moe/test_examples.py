"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "moe"


def test_accelerates_and_generates(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "accelerate_and_generate.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Return the number of ")
    nats = float(lines[-1].split()[-2])
    # Weights of four bits move a byte's distribution by less than its loss of about one nat.
    assert 0 < nats < 0.1
