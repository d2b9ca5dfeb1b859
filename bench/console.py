"""`quernstone bench` on the terminal: progress while rows run, then the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from quernstone.bench import words
from quernstone.bench.plugin import Events
from quernstone.bench.rows import Row
from quernstone.bench.run import Results

# Columns from which the table has room for everything.
WIDE = 100


@contextlib.contextmanager
def following(console: Console) -> Iterator[Events]:
    """A bar and the row that runs now; each row is printed as it ends."""
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    task = bar.add_task("collecting", total=None)

    def finished(row: Row) -> None:
        console.print(line(row), soft_wrap=True)
        bar.advance(task)

    # Rows are timed while this is on the screen: a redraw must not steal their cores.
    with Live(bar, console=console, auto_refresh=False, transient=True) as live:

        def started(row_id: str) -> None:
            bar.update(task, description=row_id)
            live.refresh()

        yield Events(
            total=lambda count: bar.update(task, total=count), started=started, finished=finished
        )


def line(row: Row) -> Text:
    text = Text(" ")
    text.append(f"{row.id}  ", style="cyan")
    text.append(words.figure(row.ours, row.unit), style="bold")
    nearest = words.nearest_rival(row)
    if nearest:
        text.append(f"  {words.ratio(nearest[1].ratio)} {nearest[0]}", style="dim")
    if row.percent_of_limit is not None:
        text.append(f"  {words.percent(row.percent_of_limit)} of limit", style="dim")
    if row.ours is None and row.notes:
        text.append(f"  {row.notes[-1]}", style="yellow")
    return text


def show(console: Console, results: Results) -> None:
    """A table of all rows per vertical, section by section, and what could not be timed."""
    for vertical in dict.fromkeys(row.vertical for row in results.rows):
        rows = [row for row in results.rows if row.vertical == vertical]
        console.print(_table(vertical, rows, wide=console.width >= WIDE))
        console.print()
    missing = {
        f"{name}: {rival.absent}"
        for row in results.rows
        for name, rival in row.rivals.items()
        if rival.absent
    }
    for line in sorted(missing):
        console.print(Text(f"  {line}", style="yellow"))


def _table(vertical: str, rows: list[Row], wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column(vertical, style="cyan", no_wrap=wide, overflow="fold")
    titles = ["ours", "nearest rival", "limit", *(["error"] if wide else [])]
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("promise")
    section = None
    for row in rows:
        _, head, *_ = row.id.split(".")
        if section not in (None, head):
            table.add_section()
        section = head
        nearest = words.nearest_rival(row)
        cells: list[str | Text] = [
            row.id.removeprefix(f"{vertical}."),
            Text(words.figure(row.ours, row.unit), style="bold"),
            f"{words.ratio(nearest[1].ratio)} {nearest[0]}" if nearest else "",
            words.percent(row.percent_of_limit) if row.percent_of_limit else "",
        ]
        if wide:
            cells.append(words.number(row.error) if row.error is not None else "")
        table.add_row(*cells, badge(row))
    return table


def badge(row: Row) -> Text:
    if row.met is None:
        return Text("")
    if row.met:
        return Text("met", style="green")
    unmeasured = all(verdict["got"] is None for verdict in row.target)
    return Text("not measured" if unmeasured else "missed", style="yellow" if unmeasured else "red")


def contract(results: Results) -> Group:
    """Every promise with what was got, the missed ones first."""
    verdicts = [(row, verdict) for row in results.rows for verdict in row.target]
    verdicts.sort(key=lambda pair: pair[1]["met"])
    lines = []
    for row, verdict in verdicts:
        met = verdict["met"]
        line = Text("met    " if met else "missed ", style="green" if met else "red")
        line.append(row.id, style="cyan")
        measure = verdict["measure"].replace("_", " ").replace("ours", "")
        line.append(f" {measure}".rstrip() + " ", style="dim")
        line.append(words.verdict(verdict))
        lines.append(line)
    met_count = sum(verdict["met"] for _, verdict in verdicts)
    lines.append(Text(f"{met_count} of {len(verdicts)} promises met", style="bold"))
    return Group(*lines)
