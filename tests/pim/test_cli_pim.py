"""The command `quernstone pim analyze`: what it says, what it writes, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from quernstone.cli import app
from quernstone.importers import read, write_onnx
from quernstone.pim.report import analyze
from tests.pim import networks


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pim", "analyze", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    write_onnx(networks.perceptron(), path)
    return path


def test_reports_every_layer(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r" / "report.json"
    result = _call(str(file), "--out", str(out))
    assert result.exit_code == 0, result.output
    for node in read(file).layers():
        assert node.name in result.output
    report = json.loads(out.read_text())["net.onnx"]
    want = analyze(read(file))
    assert report["hamming_rate"] == pytest.approx(want.hamming_rate)
    assert len(report["layers"]) == 2


def test_reads_arrays_that_are_no_network(tmp_path: Path) -> None:
    save_file({"w": networks.normal(5, 7)}, tmp_path / "w.safetensors")
    result = _call(str(tmp_path / "w.safetensors"), "--bits", "4", "--shifts", "none")
    assert result.exit_code == 0, result.output
    assert "35 weights of 4 bits" in result.output


@pytest.mark.parametrize("ending", ["onnx", "safetensors"])
def test_rounds_and_writes_the_network(file: Path, tmp_path: Path, ending: str) -> None:
    inputs, export = tmp_path / "x.npz", tmp_path / f"few.{ending}"
    x = networks.rows(200, 24)
    np.savez(inputs, x=x.numpy())
    result = _call(str(file), "--snr", "25", "--inputs", str(inputs), "--export", str(export))
    assert result.exit_code == 0, result.output
    assert "% of the ones gone" in result.output
    want = networks.perceptron().run({"x": x})["y"]
    got = next(iter(read(export).run({"x": x}).values()))
    assert float((got - want).square().sum() / want.square().sum()) < 10**-1.8


def test_ends_with_2_and_one_line_where_something_is_wrong(file: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["nothing.onnx"], "MODEL: got 'nothing.onnx'"),
        ([str(file), "--shifts", "all"], "--shifts: got 'all'"),
        ([str(file), "--snr", "30"], "--inputs: got none"),
        ([str(file), "--export", "x.onnx"], "without --snr"),
        ([str(file), "--out", "x.txt"], "--out: got x.txt"),
        ([str(file), "--snr", "30", "--inputs", str(tmp_path / "no.npz")], "no such file"),
    ):
        result = _call(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.output
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(file.read_bytes()[:100])
    assert _call(str(broken)).exit_code == 2


@pytest.mark.parametrize("command", ["analyze", "map"])
def test_damaged_inputs_are_named(command: str, file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=networks.rows(50, 24).numpy())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "text.npz", x=np.array(["a"]))
    options = ["--snr", "25"] if command == "analyze" else []
    for name in ("cut.npz", "one.npy", "text.npz"):
        arguments = ["pim", command, str(file), *options, "--inputs", str(tmp_path / name)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2, result.output
        assert f"{name}: got no whole .npz file of arrays" in result.output


def test_networks_of_zeros_are_rounded_and_mapped(tmp_path: Path) -> None:
    graph = networks.perceptron()
    zeros = {name: np.zeros_like(x) for name, x in graph.constants.items()}
    write_onnx(replace(graph, constants=zeros), tmp_path / "zeros.onnx")
    np.savez(tmp_path / "x.npz", x=networks.rows(50, 24).numpy())
    for command in (["analyze", "--snr", "25"], ["map"]):
        arguments = [*command, str(tmp_path / "zeros.onnx"), "--inputs", str(tmp_path / "x.npz")]
        result = CliRunner().invoke(app, ["pim", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
