"""What the command line of the study does, for `quernstone bench --study` too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from quernstone.bench import record
from quernstone.bench.study.ledger import Ledger

ROWS = Path("bench/results/attention_study.jsonl")


def main(
    names: Sequence[str],
    *,
    quick: bool = False,
    export: bool = False,
    listed: bool = False,
    jobs: int = 2,
    out: Path = Path("out/study"),
    results: Path | None = None,
) -> None:
    """Ends the process with 2 for a wrong argument or file, with 1 where a part went wrong."""
    console = Console(file=sys.stdout, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        if quick:
            from quernstone.bench.study import show

            show.quick(say)
            return
        troubles = _study(names, out, results, say, export=export, listed=listed, jobs=jobs)
    except (ValueError, OSError, ImportError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if troubles:
        raise typer.Exit(1)


def _study(
    names: Sequence[str],
    out: Path,
    results: Path | None,
    say: Callable[[str], None],
    *,
    export: bool,
    listed: bool,
    jobs: int,
) -> list[str]:
    from quernstone.bench.study import run
    from quernstone.bench.study.parts import chosen

    parts = chosen(names)
    root = _root()
    ledger = Ledger(results or ((root / ROWS) if root else out / ROWS.name))
    if listed:
        pending = {part.name for part in run.pending_of(parts, ledger, run.documentation())}
        for part in parts:
            say(f"{'to run   ' if part.name in pending else 'on record'}  {part.name}")
        return []
    commit = record.commit(root) if root else ""
    troubles = [] if export else run.run(parts, ledger, out, jobs=jobs, commit=commit, say=say)
    if root is not None and results is None:
        from quernstone.bench.study.export import export as write

        write(ledger, out, root / "bench", say)
    return troubles


def _root() -> Path | None:
    try:
        return record.checkout()
    except record.NotACheckout:
        return None
