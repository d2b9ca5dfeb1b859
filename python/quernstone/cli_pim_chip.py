"""The commands `quernstone pim simulate` and `quernstone pim map`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quernstone.importers import Graph
    from quernstone.pim.analysis import Report
    from quernstone.pim.chip import Mode
    from quernstone.pim.sensitivity import Change

_Network = Annotated[
    str,
    typer.Argument(
        help="detector, recogniser, classifier, magika, silero, minilm or smollm2, or a file "
        "(.onnx, .safetensors, .gguf) with --inputs."
    ),
]
_Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", help="Inputs by name, .npz; networks by name have their own."),
]
_Chip = Annotated[str, typer.Option("--chip", help="aim-7nm-256tops.")]
_Snr = Annotated[float, typer.Option("--snr", help="dB of each layer that rounding keeps.")]


def simulate(
    network: _Network,
    inputs: _Inputs = None,
    chip: _Chip = "aim-7nm-256tops",
    snr: _Snr = 34.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also halve and double every assumed figure.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the mapper.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report as .json.")] = None,
) -> None:
    """Takes a network through rounding, shifts, booster and mapping on a chip (a model, no
    silicon): volts, joules and seconds."""

    def run(console: Any) -> None:
        from quernstone.pim.analysis import analyze
        from quernstone.pim.sensitivity import sweep as swept

        _check_json(out)
        graph, batches = _network(network, inputs)
        found = analyze(graph, batches, chip, snr=snr, seed=seed)
        _show(console, found)
        changes: list[Change] = []
        if sweep:
            changes = swept(found.traces, found.chip, found.shape, seed=seed)
            _show_sweep(console, changes)
        if out is not None:
            _write(console, out, _json(found, changes))

    from quernstone.cli_moe import _guarded

    _guarded(run)


def map_(
    network: _Network,
    inputs: _Inputs = None,
    chip: _Chip = "aim-7nm-256tops",
    mode: Annotated[str, typer.Option("--mode", help="low-power or sprint.")] = "low-power",
    moves: Annotated[
        int, typer.Option("--moves", min=0, help="Exchanges that are tried in a round.")
    ] = 200_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the exchanges.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the mapping as .json.")] = None,
) -> None:
    """Places a network's 8-bit weights on the groups of a chip by Hamming rate."""

    def run(console: Any) -> None:
        from quernstone.pim.analysis import map_network

        _check_json(out)
        graph, batches = _network(network, inputs)
        rounds = map_network(graph, batches[-1], chip, mode=_mode(mode), moves=moves, seed=seed)
        table = _table("round", "tasks", "in order", "mapped", "saved")
        for index, one in enumerate(rounds):
            table.add_row(
                str(index), str(len(one.names)), f"{one.before:.4g}", f"{one.cost:.4g}",
                f"{100 * (1 - one.cost / one.before if one.before else 0.0):.1f} %",
            )  # fmt: skip
        console.print(table)
        console.print("[dim]charge times V^2 in low power, seconds in sprint; simulated[/dim]")
        if out is not None:
            _write(console, out, [one.to_json() for one in rounds])

    from quernstone.cli_moe import _guarded

    _guarded(run)


def _mode(name: str) -> Mode:
    from quernstone.pim.chip import Mode

    for mode in get_args(Mode):
        if name == mode:
            found: Mode = mode
            return found
    raise ValueError(f"--mode: got {name!r}, expected one of {', '.join(get_args(Mode))}")


def _check_json(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out: got {out}, expected a name in .json")


def _network(name: str, inputs: Path | None) -> tuple[Graph, list[dict[str, Any]]]:
    """The graph, and its calibration inputs; the last one runs."""
    from quernstone.bench.cases.pim_networks import NETWORKS
    from quernstone.importers import read
    from quernstone.pim.analysis import load_inputs

    if name in NETWORKS:
        of = NETWORKS[name]
        return of.load(), of.inputs("calibration") if inputs is None else load_inputs(inputs)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(NETWORKS)
        raise ValueError(f"NETWORK: got {name!r}, expected a file, or one of {known}")
    if inputs is None:
        raise ValueError("--inputs: got none, expected an .npz file of the network's inputs")
    return read(path), load_inputs(inputs)


def _show(console: Any, found: Report) -> None:
    table = _table("technique", "worst drop", "op/J", "op/s", "failures", "beyond")
    for name, drop, efficiency, rate, failures, beyond in found.rows():
        table.add_row(
            name, f"{drop:.1f} mV", f"{efficiency:.3f}x", f"{rate:.3f}x", f"{failures:.0f}",
            str(beyond),
        )  # fmt: skip
    console.print(table)
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in found.hamming.items())
    console.print(f"HR: {rates}; {100 * found.share:.1f} % of the products in macros")
    console.print(
        "[dim]Simulated, on a model of a chip whose figures are mostly assumed. op/J in low "
        "power, op/s in sprint, over int8 at the level of sign-off; failures for a million "
        "cycles.[/dim]",
        soft_wrap=True,
    )


def _show_sweep(console: Any, changes: Sequence[Change]) -> None:
    table = _table("figure", "factor", "drop taken away", "op/J", "op/s")
    for change in changes:
        if change.headline is None:
            table.add_row(change.figure, f"{change.factor:g}", change.reason, "", "")
            continue
        drop, efficiency, rate = change.headline
        table.add_row(
            change.figure, f"{change.factor:g}", f"{100 * drop:.1f} %", f"{efficiency:.3f}x",
            f"{rate:.3f}x",
        )  # fmt: skip
    console.print(table)


def _json(found: Report, changes: Sequence[Change]) -> dict[str, Any]:
    names = ("technique", "worst_drop_mv", "efficiency", "speed_up", "failures", "beyond")
    return {
        "format": "quernstone.pim.chip",
        "kind": "simulated; the chip is a model, not silicon",
        "chip": {name: str(figure) for name, figure in found.chip.figures.items()},
        "hamming_rate": dict(found.hamming),
        "share_in_macros": found.share,
        "headline": found.headline._asdict(),
        "techniques": [dict(zip(names, row, strict=True)) for row in found.rows()],
        "sweep": [
            {
                "figure": change.figure,
                "factor": change.factor,
                "headline": None if change.headline is None else change.headline._asdict(),
                "reason": change.reason,
            }
            for change in changes
        ],
    }


def _write(console: Any, out: Path, content: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)


def _table(*titles: str) -> Any:
    from quernstone.cli_moe import _table as table

    return table(*titles)
