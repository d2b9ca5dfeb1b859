"""`python -m quernstone.bench.study`: runs, exports and shows the training study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="Parts by the beginning of their names, e.g. `tinylm/sink`; else all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Evaluate the checkpoints that come along; a minute.")
    ] = False,
    export: Annotated[
        bool, typer.Option("--export", help="Only write recorded.json and the checkpoints anew.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Only tell which parts are there.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Parts of tinylm at a time.", min=1)] = 2,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the states of trainings.", metavar="DIR")
    ] = Path("out/study"),
    results: Annotated[
        Path | None,
        typer.Option("--results", help="Rows; bench/results/attention_study.jsonl of a clone."),
    ] = None,
) -> None:
    """Trains what is not on record yet, one row a part, and writes down what was found.

    The whole study takes about two and a half hours on two cores. It may be stopped at any time
    and goes on from there when it is started again.
    """
    from quernstone.bench.study import command

    command.main(
        parts or [],
        quick=quick,
        export=export,
        listed=listed,
        jobs=jobs,
        out=out,
        results=results,
    )


if __name__ == "__main__":
    typer.run(main)
