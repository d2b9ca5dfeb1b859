"""Appends rows to bench/results/<vertical>.jsonl of a checkout: the figures that stay."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

from quernstone.bench.run import Results


class NotACheckout(RuntimeError):
    """The command needs a git clone of the project."""


def checkout(start: Path | None = None) -> Path:
    """The root of the clone that holds the working directory."""
    start = start or Path.cwd()
    done = _git(start, "rev-parse", "--show-toplevel")
    root = Path(done.stdout.strip()) if done.returncode == 0 else None
    if root is None or not (root / "bench" / "targets.toml").is_file():
        raise NotACheckout(f"{start} is not in a git clone of quernstone; run this inside one")
    return root


def commit(root: Path) -> str:
    """The commit, with + where files differ from it."""
    head = _git(root, "rev-parse", "--short=12", "HEAD").stdout.strip() or "none"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no").stdout.strip()
    return f"{head}+" if changed else head


def append(results: Results, root: Path) -> list[Path]:
    """Writes each measured row with its commit, date and machine; gives the files written."""
    stamp = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(root),
        "machine": results.machine,
    }
    folder = root / "bench" / "results"
    folder.mkdir(exist_ok=True)
    written = []
    for row in results.rows:
        if row.ours is None:
            continue
        path = folder / f"{row.vertical}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row.to_json(), **stamp}) + "\n")
        written.append(path)
    return sorted(set(written))


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise NotACheckout("git is not installed") from error
