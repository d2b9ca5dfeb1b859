"""The command `quernstone`. Each command imports what it needs, so that `--help` is quick."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from quernstone import cli_moe, cli_pim

app = typer.Typer(
    name="quernstone",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Efficient inference on very different hardware, with a reference and a measurement for everything.

`quernstone info` says what this machine and this installation have. `quernstone bench --quick`
runs real models and the main kernels beside their rivals in about three minutes and writes
`out/report.html`.
""",
)
attention = typer.Typer(
    no_args_is_help=True, help="Attention with sinks and gates, and what its gates say."
)
app.add_typer(attention, name="attention")
app.add_typer(cli_moe.app, name="moe")
app.add_typer(cli_pim.app, name="pim")


@app.command()
def info() -> None:
    """Shows the instruction set, threads and versions in use, and which optional parts are here."""
    from importlib.metadata import version

    from rich.console import Console
    from rich.table import Table

    import quernstone
    from quernstone.bench import machine, optional

    console = Console()
    levels = " ".join(
        f"[bold]{level}[/bold]" if level == quernstone.isa() else f"[dim]{level}[/dim]"
        for level in quernstone.isas()
    )
    facts = _grid()
    facts.add_row("quernstone", f"[bold]{quernstone.__version__}[/bold]")
    facts.add_row("instruction set", f"{levels}  [dim](QUERNSTONE_ISA lowers it)[/dim]")
    facts.add_row(
        "threads", f"{quernstone.num_threads()} of {machine.cores()} cores, in torch's pool"
    )
    facts.add_row("processor", machine.cpu_name())
    for name in ("torch", "numpy", "triton"):
        facts.add_row(name, machine.version(name) or "[yellow]missing[/yellow]")
    facts.add_row("python", f"{platform.python_version()}, typer {version('typer')}")
    console.print(facts)

    console.print()
    parts = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("optional part", "for", "version"):
        parts.add_column(title)
    found = optional.parts()
    for part in found:
        shown = part.version or "[yellow]missing[/yellow]"
        parts.add_row(part.name, part.group, shown)
    console.print(parts)
    console.print()
    for command in dict.fromkeys(part.command for part in found if part.version is None):
        console.print(f"[yellow]to get what is missing:[/yellow] {_plain(command)}", soft_wrap=True)
    console.print(
        f"[dim]the models of `bench`:[/dim] {_plain(optional.GET_MODELS)}", soft_wrap=True
    )


@app.command()
def bench(
    verticals: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to measure, e.g. `attention`. All by default.", metavar="VERTICAL"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The main job and one row of each kind: minutes.")
    ] = False,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Only the promised rows; exits 1 when a promise is missed."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="A row id or its beginning; may be repeated.", metavar="ID"),
    ] = None,
    study: Annotated[
        bool,
        typer.Option(
            "--study",
            help="The training study of the attention gates instead; hours, resumable. "
            "VERTICAL is then the beginning of a part's name.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Compare with another commit of this git clone.", metavar="REF"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of results.json and report.html.", metavar="DIR")
    ] = Path("out"),
    record: Annotated[
        bool, typer.Option("--record", help="Also append the rows to bench/results/ of this clone.")
    ] = False,
) -> None:
    """Measures ours beside its rivals and beside what the machine can do.

    Every result is compared with the reference before it is timed. Rivals run on the same inputs
    in alternating rounds, and the limit (a matrix product of torch, memory bandwidth) is measured
    in the same rounds. Close other programs first: a busy machine shows in the spread.

    Examples:

    - `quernstone bench --quick`
    - `quernstone bench --targets attention`
    - `quernstone bench --only attention.forward.fp32 --out out/forward`
    - `quernstone bench --quick --base HEAD~1 attention`
    - `quernstone bench --study`, or `--study --quick` for the models that come along
    """
    import sys

    from rich.console import Console

    from quernstone.bench import console as view
    from quernstone.bench import record as recorded
    from quernstone.bench import report, run
    from quernstone.bench.plugin import Selection

    if study:
        from quernstone.bench.study.command import main as run_study

        run_study(verticals or [], quick=quick, out=out / "study")
        return
    # Bound to the terminal: while rows run, what else is printed goes to a log.
    console = Console(file=sys.stdout)
    chosen = list(verticals or [])
    selection = Selection(quick, targets, tuple(only or ()))
    words = [*(["--quick"] if quick else []), *(["--targets"] if targets else [])]
    words += [f"--only={name}" for name in selection.only] + chosen
    try:
        files = run.files(chosen)
        _writable(out)
        root = recorded.checkout() if record else None
        if base is not None:
            _compare(console, base, words)
            return
        with view.following(console) as events:
            results = run.run(files, selection, events=events)
    except (ValueError, OSError, recorded.NotACheckout) as error:
        _stop(console, str(error))
    command = " ".join(["quernstone bench", *words])
    results.save(out / "results.json")
    report.write(results, out / "report.html", command)
    console.print()
    view.show(console, results)
    if targets:
        console.print()
        console.print(view.contract(results))
    for path in recorded.append(results, root) if root else []:
        console.print(f"recorded in {path.relative_to(root or path)}", style="dim")
    for trouble in results.troubles:
        console.print(trouble, style="red", markup=False, soft_wrap=True)
    if results.troubles:
        (out / "bench.log").write_text(results.log, encoding="utf-8")
    console.print(f"\n{out / 'report.html'}  {out / 'results.json'}", soft_wrap=True)
    if results.troubles or (targets and results.missed):
        raise typer.Exit(1)


@attention.command()
def heads(
    model: Annotated[
        str, typer.Option("--model", help="`smollm2`, or a folder with a causal model.")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the text.", min=2)] = 512,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the figure (.svg, .png, .pdf) or numbers (.json)."),
    ] = None,
) -> None:
    """Reports how much each attention head of a model does, and which ones rest on a sink."""
    from rich.console import Console

    console = Console()
    try:
        if out is not None:
            if out.suffix not in (".svg", ".png", ".pdf", ".json"):
                raise ValueError(f"--out: got {out}, expected a name in .svg, .png, .pdf or .json")
            _writable(out.parent)
        report = _head_report(model, tokens)
    except (ImportError, ValueError, OSError) as error:
        _stop(console, str(error))
    table = _head_table(report)
    console.print(table)
    dead = ", ".join(f"{layer}.{head}" for layer, head in report.dead_heads) or "none"
    console.print(f"sink rate {report.sink_rate:.0%}, mean CV {report.cv.mean():.3f}")
    console.print(f"dead heads (layer.head, importance < {report.dead_below:g}): {dead}")
    if out is not None:
        if out.suffix == ".json":
            import json

            out.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        else:
            report.figure().savefig(out)
        console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)


def _head_report(model: str, tokens: int) -> Any:
    from quernstone.attention import head_report
    from quernstone.attention.models import load_smollm2, real_text

    network: Any
    tokenizer: Any
    if model == "smollm2":
        network, tokenizer = load_smollm2()
    else:
        if not Path(model).is_dir():
            raise ValueError(f"--model: got {model!r}, expected smollm2 or a folder with a model")
        import transformers

        from quernstone.attention import register_with_transformers

        register_with_transformers()
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="quernstone", local_files_only=True
        )
        network.eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    batch = tokenizer(
        real_text(8 * tokens), return_tensors="pt", truncation=True, max_length=tokens
    )
    return head_report(network, batch)


def _head_table(report: Any) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("importance of each head")
    for title in ("mean", "CV", "effective heads"):
        table.add_column(title, justify="right")
    shades = " ▁▂▃▄▅▆▇█"
    for layer, row in enumerate(report.importance):
        bars = "".join(shades[round(8 * min(1.0, max(0.0, float(value))))] for value in row)
        numbers = (row.mean(), report.cv[layer], report.effective_heads[layer])
        table.add_row(str(layer), bars, *(f"{value:.2f}" for value in numbers))
    return table


def _compare(console: Any, ref: str, words: list[str]) -> None:
    from quernstone.bench.base import BaseFailed, compare
    from quernstone.bench.record import checkout

    checkout()
    console.print(f"building {ref}, then measuring it and this version", style="dim")
    try:
        console.print(compare(ref, words), markup=False, highlight=False, soft_wrap=True)
    except BaseFailed as error:
        _stop(console, str(error))


def _grid() -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column()
    return grid


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _writable(folder: Path) -> None:
    """Makes the folder and writes into it: before minutes of measuring, not after."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out: {folder} is no folder to write to ({error.strerror})") from None


def _stop(console: Any, why: str) -> Any:
    console.print(why, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
