"""Runs benchmark files through pytest and gives their rows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quernstone.bench import machine
from quernstone.bench import targets as contract
from quernstone.bench.plugin import Collector, Events, Selection
from quernstone.bench.rows import Row

FOLDER = Path(__file__).parent
# Limits of the machine itself: part of every full run, whatever the verticals.
MACHINE = "machine"


@dataclass
class Results:
    rows: list[Row]
    machine: dict[str, Any]
    panels: list[tuple[str, str, str, str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    log: str = ""

    @property
    def missed(self) -> list[Row]:
        return [row for row in self.rows if row.met is False]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": self.machine, "rows": [row.to_json() for row in self.rows]}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def verticals(folder: Path = FOLDER) -> list[str]:
    """The verticals that have a benchmark file."""
    return sorted({_vertical(path) for path in folder.glob("bench_*.py")} - {MACHINE})


def _vertical(path: Path) -> str:
    return path.stem.split("_")[1]


def files(chosen: Sequence[str], folder: Path = FOLDER) -> list[Path]:
    """The files of the chosen verticals (all by default), the machine's limits first.

    Raises ValueError that names a vertical without a file.
    """
    known = verticals(folder)
    strange = [name for name in chosen if name not in known]
    if strange:
        raise ValueError(
            f"no benchmarks for {', '.join(strange)}; there are some for {', '.join(known)}"
        )
    names = {MACHINE, *(chosen or known)}
    found = [path for path in sorted(folder.glob("bench_*.py")) if _vertical(path) in names]
    return sorted(found, key=lambda path: _vertical(path) != MACHINE)


def run(
    bench_files: Sequence[Path],
    selection: Selection,
    *,
    targets_path: Path | None = None,
    events: Events | None = None,
    json_path: Path | None = None,
) -> Results:
    """Measures the selected rows of the files, one after the other, in this process.

    Raises ValueError when the rows do not fit the contract, or when nothing was selected.
    """
    chosen = {_vertical(path) for path in bench_files}
    targets = [t for t in contract.load(targets_path) if t.id.split(".")[0] in chosen]
    collector = Collector(selection, targets, machine.versions(), events or Events())
    arguments = [
        *(str(path) for path in bench_files),
        *("-c", os.devnull, "--rootdir", str(bench_files[0].parent)),
        *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
        *("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"),
        *("-q", "--capture=no", "--tb=short", "--noconftest"),
        *("--benchmark-disable-gc", "--benchmark-warmup=off", "--benchmark-enable"),
    ]
    if json_path is not None:
        arguments.append(f"--benchmark-json={json_path}")
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as storage,
        _quiet(),
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        arguments.append(f"--benchmark-storage={storage}")
        status = pytest.main(arguments, plugins=[collector])
    if status == pytest.ExitCode.USAGE_ERROR:
        raise ValueError(_usage_error(log.getvalue()))
    results = Results(
        collector.rows, machine.describe(), collector.panels, collector.troubles, log.getvalue()
    )
    if status == pytest.ExitCode.INTERRUPTED and not results.troubles:
        results.troubles.append("interrupted; rows that had ended are kept")
    if not results.rows and not results.troubles:
        raise ValueError("no row was selected")
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars off the terminal and the options of others out of the run."""
    calm = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # What a user sets for the tests of another project is not for this run of pytest.
    foreign = [name for name in os.environ if name.startswith("PYTEST_")]
    saved = {name: os.environ.get(name) for name in (*calm, *foreign)}
    os.environ.update({name: value for name, value in calm.items() if saved[name] is None})
    for name in foreign:
        del os.environ[name]
    try:
        with warnings.catch_warnings():
            # A warning of a rival is for the log, even in a process that makes warnings errors.
            warnings.simplefilter("default")
            yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _usage_error(log: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "pytest refused its arguments"
