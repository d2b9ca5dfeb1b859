"""The page: whole in itself, and what a browser makes of it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from quernstone.bench import plots, report
from quernstone.bench.rows import LimitResult, RivalResult, Row
from quernstone.bench.run import Results

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def _results() -> Results:
    verdict = {
        "measure": "percent_of_limit",
        "comparison": ">=",
        "value": 80,
        "got": 84.0,
        "met": True,
        "margin": 5.0,
        "words": "80 % of <torch.mm>",
    }
    timed = Row(
        "attention.forward.fp32.t1",
        "attention",
        "forward & causal",
        "ms",
        1,
        ours=60.0,
        p20=58.0,
        p80=64.0,
        rivals={
            "eager": RivalResult(540.0, 530.0, 560.0, 9.0, 8.8, 9.3),
            "onnx": RivalResult(absent="not here: pip install onnxruntime"),
        },
        ratio=9.0,
        limit=LimitResult("torch.mm", 92.0, "GF/s"),
        percent_of_limit=84.0,
        error=3e-7,
        target=[verdict],
        met=True,
        work={"operations": 4.3e9, "bytes": 1.7e7},
    )
    missed = {**verdict, "measure": "ours", "comparison": "<=", "met": False, "margin": -5.0}
    memory = Row(
        "attention.memory",
        "attention",
        "<script>alert(1)</script>",
        "MB",
        1,
        ours=84.0,
        kind="bytes",
        target=[missed],
        met=False,
    )
    peak = Row("machine.mm.fp32.t1", "machine", "torch.mm", "GF/s", 1, ours=92.0)
    read = Row("machine.dram.read.t1", "machine", "read", "GB/s", 1, ours=11.0)
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([0, 1], [1, 0])
    panel = ("attention", "Heads", plots.svg(figure, "heads"), "a caption")
    machine = {"cpu": "A & B", "cores": 2, "isa": "avx2", "isas": ["avx2"], "versions": {"x": "1"}}
    return Results([peak, read, timed, memory], machine, [panel])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write(_results(), path, "quernstone bench --quick")
    return path


def test_the_page_fetches_nothing(page: Path) -> None:
    text = page.read_text()
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)[^)]*\)|<script', text)
    assert outside == []


def test_words_of_a_row_cannot_become_markup(page: Path) -> None:
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "80 % of &lt;torch.mm&gt;" in text
    assert "A &amp; B" in text


def test_every_row_and_verdict_is_on_the_page(page: Path) -> None:
    text = page.read_text()
    for row in _results().rows:
        assert f'data-row="{row.id}"' in text
    assert text.count('class="badge met"') == 1
    assert text.count('class="badge missed"') == 1
    assert "not here: pip install onnxruntime" in text
    assert "1 of 2" in text


def test_ids_inside_figures_are_unique(page: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))


def test_headline_names_the_fastest_rival_and_what_is_open() -> None:
    rows = [row for row in _results().rows if row.vertical == "attention"]
    headline = report.headline(rows)
    assert headline.startswith("9.0× the speed of eager, the fastest rival")
    assert "1 of 2 promises open" in headline


def test_a_run_without_rivals_has_a_page_too() -> None:
    row = Row("fake.bytes", "fake", "size", "MB", 1, ours=3.0, kind="bytes")
    text = report.page(Results([row], {}))
    assert 'data-row="fake.bytes"' in text
    assert "<svg" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page(page: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "page.png"
    dom = _chromium(tmp_path, "--dump-dom", f"--window-size={width},2000", page.as_uri())
    assert dom.count('class="row"') == 4
    assert dom.count("<svg") == 3
    assert "undefined" not in dom
    _chromium(tmp_path, f"--screenshot={shot}", f"--window-size={width},2000", page.as_uri())
    picture = imread(shot)[:, :, :3]
    assert picture.shape[1] == width
    background = picture[2, 2]
    inked = np.abs(picture - background).max(axis=2) > 0.2
    assert 0.01 < inked.mean() < 0.5
    # Nothing reaches the edge: the page does not scroll sideways, on a phone neither.
    assert not inked[:, -4:].any()
    accent = np.abs(picture - np.array([15, 107, 107]) / 255).max(axis=2) < 0.02
    assert accent.sum() > 50


def _chromium(folder: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    # A sanitizer that this process was started with is not the browser's.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
