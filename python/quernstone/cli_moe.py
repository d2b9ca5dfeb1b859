"""The command `quernstone moe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quernstone.cli_moe_model import register

if TYPE_CHECKING:
    from quernstone.moe import CostModel, ExpertsShape, Trace

app = typer.Typer(
    no_args_is_help=True,
    help="Mixtures of experts: what an expert costs here, what is computed where, what to keep.",
)

_Model = Annotated[
    str, typer.Option("--model", help="mixtral-8x7b, deepseek-v2-lite or qwen2-57b-a14b.")
]
_Format = Annotated[str, typer.Option("--format", help="Of the weights: int4, int8 or bf16.")]
_Costs = Annotated[
    str,
    typer.Option(
        "--costs", help="a6000-xeon10, rtx4090, h100, or a file that `moe profile` wrote."
    ),
]


@app.command()
def profile(
    model: _Model = "deepseek-v2-lite",
    format: _Format = "int4",
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="Take GPU and bus from a machine's published figures instead of here."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the CPU; torch's by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the costs are written.")] = Path(
        "out/costs.json"
    ),
) -> None:
    """Measures what an expert of a model costs on this machine, by the number of its tokens."""

    def run(console: Any) -> None:
        import torch

        from quernstone.moe import profile_machine

        if threads is not None:
            torch.set_num_threads(threads)
        costs = profile_machine(_shape(model, format), gpu=gpu)
        out.parent.mkdir(parents=True, exist_ok=True)
        costs.save(out)
        _show_costs(console, costs)
        console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)

    _guarded(run)


@app.command()
def plan(
    model: _Model = "deepseek-v2-lite",
    costs: _Costs = "a6000-xeon10",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=65536, help="Of the layer's input.")
    ] = 1,
    cached: Annotated[
        float, typer.Option("--cached", min=0, max=1, help="Share of experts on the GPU.")
    ] = 0.25,
    policy: Annotated[str, typer.Option("--policy", help="Of the schedule.")] = "hybrid",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the routing and of the cache.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the plan: .svg or .json.")
    ] = None,
) -> None:
    """Schedules one layer of a model over CPU, bus and GPU, beside the other policies.

    The routing is random, each expert as likely; `moe simulate` takes that of a trained model.
    """

    def run(console: Any) -> None:
        import numpy as np

        from quernstone.moe import MODELS, schedule_layer
        from quernstone.moe.schedule import POLICIES
        from quernstone.moe.simulate import plan_layer

        if policy not in POLICIES:
            raise ValueError(f"--policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
        if out is not None and out.suffix not in (".svg", ".json"):
            raise ValueError(f"--out: got {out}, expected a name in .svg or .json")
        prices = _costs(costs, model)
        of = MODELS[model]
        random = np.random.default_rng(seed)
        chosen = random.random((tokens, of.experts)).argsort(axis=1)[:, : of.top_k]
        loads = np.bincount(chosen.ravel(), minlength=of.experts)
        ready = np.zeros(of.experts, bool)
        ready[random.permutation(of.experts)[: round(cached * of.experts)]] = True
        active = loads > 0
        layer = prices.layer(loads[active], ready[active])
        table = _table("policy", "ms", "on the GPU", "moved")
        for name in POLICIES:
            try:
                found = schedule_layer(layer, name)
            except ValueError as error:
                table.add_row(name, str(error), "", "")
                continue
            moved = int(np.isfinite(found.transfer_start).sum())
            table.add_row(
                name, f"{1e3 * found.makespan:.3f}", str(int(found.device.sum())), str(moved)
            )
        console.print(f"{int(active.sum())} experts active, {int(ready[active].sum())} cached")
        console.print(table)
        console.print(f"[dim]simulated; {prices.note}[/dim]", soft_wrap=True)
        if out is not None:
            title = f"{model}, {tokens} tokens, {cached:.0%} cached: {policy}, simulated"
            _write_plan(plan_layer(layer, policy, title), out)
            console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)

    _guarded(run)


@app.command()
def simulate(
    trace: Annotated[
        str,
        typer.Option("--trace", help="top2of16, top6of64 (trained models), or a trace file."),
    ] = "top6of64",
    model: _Model = "deepseek-v2-lite",
    costs: _Costs = "a6000-xeon10",
    cached: Annotated[
        float, typer.Option("--cached", min=0, max=1, help="Share of experts on the GPU.")
    ] = 0.25,
    cache: Annotated[str, typer.Option("--cache", help="Policy of the caches.")] = "reuse",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the trace.")] = 500,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the last step: .svg or .json.")
    ] = None,
) -> None:
    """Replays a routing trace: hit rate of every cache, time of every schedule."""

    def run(console: Any) -> None:
        import numpy as np

        from quernstone.moe import Trace
        from quernstone.moe import simulate as module
        from quernstone.moe.cache import POLICIES
        from quernstone.moe.study import study

        if cache not in POLICIES:
            raise ValueError(f"--cache: got {cache!r}, expected one of {', '.join(POLICIES)}")
        if out is not None and out.suffix not in (".svg", ".json"):
            raise ValueError(f"--out: got {out}, expected a name in .svg or .json")
        whole = _trace(trace)
        slots = round(cached * whole.experts)
        last = int(np.searchsorted(whole.steps, steps))
        scores = None if whole.scores is None else whole.scores[:, :last]
        part = Trace(whole.experts, whole.ids[:, :last], whole.steps[:last], scores, whole.meta)
        prices = _costs(costs, model)
        console.print(study(part, [slots]).to_text(), highlight=False)
        found = module.simulate(part, prices, slots, cache=cache)
        table = _table("schedule", "ms a step", "over fixed")
        for name, seconds in found.seconds.items():
            table.add_row(
                name, f"{1e3 * seconds / found.steps:.3f}", f"{found.speed_up(name):.2f}x"
            )
        console.print()
        console.print(table)
        console.print(
            f"[dim]simulated: {found.steps} steps, {cache} cache of {slots} of {whole.experts} "
            f"experts a layer, hit rate {found.hit_rate:.3f}; {prices.note}[/dim]",
            soft_wrap=True,
        )
        if out is not None:
            step = part.number_of_steps - 1
            _write_plan(
                module.plan_step(part, prices, slots, step, cache=cache),
                out,
            )
            console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)

    _guarded(run)


def _guarded(run: Any) -> None:
    """Ends the process with 2 and one line where an argument or a file is wrong."""
    from rich.console import Console

    console = Console()
    try:
        run(console)
    except (ImportError, ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _shape(model: str, format: str) -> ExpertsShape:
    from quernstone.moe import MODELS, ExpertsShape

    if model not in MODELS:
        raise ValueError(f"--model: got {model!r}, expected one of {', '.join(MODELS)}")
    of = MODELS[model]
    group = 32 if format == "int4" else 0
    return ExpertsShape(of.experts, of.hidden, of.intermediate, format, group)  # type: ignore[arg-type]


def _costs(costs: str, model: str) -> CostModel:
    """From a preset's figures, or from a file."""
    from quernstone.moe import PRESETS, CostModel

    shape = _shape(model, "int4")
    if costs in PRESETS:
        return CostModel.of_machine(PRESETS[costs], shape)
    if not Path(costs).is_file():
        raise ValueError(
            f"--costs: got {costs!r}, expected one of {', '.join(PRESETS)}, or a file of `moe "
            "profile`"
        )
    found = CostModel.load(costs)
    if (found.shape.hidden, found.shape.intermediate) != (shape.hidden, shape.intermediate):
        raise ValueError(
            f"--costs: got experts of {found.shape.hidden} by {found.shape.intermediate}, expected "
            f"{shape.hidden} by {shape.intermediate} of {model}"
        )
    return found


def _trace(name: str) -> Trace:
    from quernstone.bench.tinylm import experts as tiny
    from quernstone.moe import Trace

    if name in tiny.CONFIGS:
        trace: Trace = tiny.load_trace(name)  # unknown to the checker until bench/ is installed
        return trace
    if not Path(name).is_file():
        known = ", ".join(tiny.CONFIGS)
        raise ValueError(f"--trace: got {name!r}, expected one of {known}, or a file")
    return Trace.load(name)


def _show_costs(console: Any, costs: CostModel) -> None:
    table = _table("tokens", "CPU ms", "GPU ms")
    for tokens in costs.cpu.tokens:
        mine, other = float(costs.cpu_seconds(tokens)), float(costs.gpu(tokens))
        table.add_row(str(tokens), f"{1e3 * mine:.3f}", f"{1e3 * other:.3f}")
    console.print(table)
    console.print(
        f"first expert of a layer on the CPU +{1e3 * costs.cpu_first:.3f} ms, transfer "
        f"{1e3 * costs.transfer:.3f} ms"
    )
    console.print(
        f"[dim]CPU {costs.cpu_source}, GPU and bus {costs.gpu_source}; {costs.note}[/dim]",
        soft_wrap=True,
    )


def _write_plan(found: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        found.save(out)
    else:
        out.write_text(found.svg() + "\n", encoding="utf-8")


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for at, title in enumerate(titles):
        table.add_column(title, justify="right" if at else "left")
    return table


register(app, _guarded)
