"""`quernstone moe pack` and `moe generate`: what they make, and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from quernstone.cli import app
from quernstone.moe import load_packed
from tests.moe.hf_tiny import tiny


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["moe", *arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny("qwen3_moe").save_pretrained(root / "whole")
    result = _call("pack", str(root / "whole"), str(root / "packed"), "--clips", "1")
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp: 8 experts of 64 by 32" in result.output
    return root / "packed"


def test_generates_what_the_model_generates(packed: Path) -> None:
    result = _call("generate", str(packed), "--ids", "5,17,3", "--tokens", "6", "--memory", "map")
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[5, 17, 3]])
    want = load_packed(packed).generate(ids, max_new_tokens=6, do_sample=False)
    assert result.output.splitlines()[0] == ",".join(map(str, want[0, 3:].tolist()))
    assert "6 tokens in" in result.output
    drawn = [
        _call(
            "generate", str(packed), "--ids", "5,17,3", "--tokens", "6", "--sample", "--seed", seed
        )
        for seed in ("1", "1", "2")
    ]
    lines = [one.output.splitlines()[0] for one in drawn]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "nowhere", "--ids", "1"), "nowhere"),
        (("generate", "PACKED", "--ids", "1,x"), "--ids: got '1,x', expected numbers"),
        (("generate", "PACKED", "--ids", "1,96"), "--ids: got '1,96', expected 0 to 95"),
        (("generate", "PACKED"), "prompt: got both or neither"),
        (("generate", "PACKED", "Hello"), "got no tokenizer, expected one, or --ids"),
        (("generate", "PACKED", "--ids", "1", "--memory", "tape"), "memory: got 'tape'"),
        (("generate", "PACKED", "--ids", "1", "--tokens", "0"), "'--tokens'"),
        (("pack", "nowhere", "nowhere-else"), "nowhere: got no config.json"),
        (("pack", "PACKED", "PACKED"), "expected no folder or an empty one"),
        (("pack", "PACKED", "out", "--format", "fp4"), "format: got 'fp4'"),
        (("pack", "PACKED", "out", "--linear", "fp4"), "linear: got 'fp4'"),
        (("pack", "PACKED", "out", "--group", "48"), "group"),
    ],
)
def test_a_wrong_argument_ends_with_two_and_a_line(
    packed: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = _call(*(str(packed) if word == "PACKED" else word for word in arguments))
    assert result.exit_code == 2, result.output
    assert words in result.output
    if not words.startswith("'"):
        assert len(result.output.splitlines()) == 1
