"""Compares this version with another commit, row by row, by pytest-benchmark's own compare."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from quernstone.bench.record import checkout

BENCH = Path(__file__).parent
# An editable installation finds its own files before the path is searched; the base comes first.
START = """
import os, runpy, sys
if os.environ.get("QUERNSTONE_BASE"):
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, os.environ["QUERNSTONE_BASE"])
runpy.run_module("quernstone.bench.base", run_name="__main__", alter_sys=True)
"""


class BaseFailed(RuntimeError):
    """The other commit cannot be checked out, built or measured."""


def compare(ref: str, arguments: Sequence[str], start: Path | None = None) -> str:
    """The table of both versions' times.

    Both run today's benchmark definitions, each in a process of its own: the other commit's
    library is built into a temporary folder that comes first on its path.

    Args:
        ref: any name of a commit.
        arguments: what else `quernstone bench` was called with.
    """
    root = checkout(start)
    with tempfile.TemporaryDirectory(prefix="quernstone-base-") as name:
        folder = Path(name)
        with _worktree(root, ref, folder / "source") as source:
            site = _build(source, folder / "site")
        base, now = folder / "base.json", folder / "now.json"
        _measure(base, arguments, site)
        _measure(now, arguments, None)
        command = [sys.executable, "-m", "pytest_benchmark", "compare", str(base), str(now)]
        command += ["--group-by=name", "--name=short", "--columns=median,iqr,rounds"]
        return _run(command, "compare").stdout.partition("Legend:")[0].rstrip()


@contextlib.contextmanager
def _worktree(root: Path, ref: str, folder: Path) -> Iterator[Path]:
    git = ["git", "-C", str(root), "worktree"]
    _run([*git, "add", "--detach", str(folder), ref], f"check {ref} out")
    try:
        yield folder
    finally:
        _run([*git, "remove", "--force", str(folder)], "remove the worktree")


def _build(source: Path, site: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    # Its rows are the CPU's.
    pip += ["-C", "cmake.define.QS_CUDA=OFF"]
    _run([*pip, "--target", str(site), str(source)], "build the other commit")
    shutil.rmtree(site / "quernstone" / "bench", ignore_errors=True)
    shutil.copytree(
        BENCH,
        site / "quernstone" / "bench",
        ignore=shutil.ignore_patterns("results", "__pycache__"),
    )
    return site


def _measure(path: Path, arguments: Sequence[str], site: Path | None) -> None:
    environment = dict(os.environ)
    if site is not None:
        environment["QUERNSTONE_BASE"] = str(site)
    command = [sys.executable, "-c", START, str(path), *arguments]
    _run(command, f"measure {'the base' if site else 'this version'}", environment)
    # Rows whose figure is no time have nothing that this comparison could tell.
    data = json.loads(path.read_text(encoding="utf-8"))
    timed = [b for b in data["benchmarks"] if b["extra_info"].get("timed")]
    if not timed:
        raise BaseFailed("no row of the selection is a time")
    path.write_text(json.dumps({**data, "benchmarks": timed}), encoding="utf-8")


def _run(
    command: Sequence[str], what: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BaseFailed(f"cannot {what}: {lines[-1] if lines else done.returncode}")
    return done


def main(arguments: Sequence[str]) -> None:
    """One side of the comparison: `JSON [--quick] [--targets] [--only=ID] [VERTICAL...]`."""
    import quernstone
    from quernstone.bench.plugin import Selection
    from quernstone.bench.run import files, run

    base = os.environ.get("QUERNSTONE_BASE")
    if base and not Path(quernstone.__file__).resolve().is_relative_to(Path(base).resolve()):
        raise SystemExit("this environment imports its own quernstone before the base")
    path, *rest = arguments
    names = [word for word in rest if not word.startswith("--")]
    only = tuple(word.removeprefix("--only=") for word in rest if word.startswith("--only="))
    selection = Selection("--quick" in rest, "--targets" in rest, only)
    run(files(names), selection, json_path=Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
