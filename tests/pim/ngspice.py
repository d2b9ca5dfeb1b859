"""ngspice as an oracle: what a netlist's nodes have at direct current or over time."""

import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quernstone import spice


def operating_point(netlist: spice.Netlist, folder: Path) -> dict[str, float]:
    """The voltage of every node but ground."""
    names, rows = _run(netlist, folder, "op")
    return {name: float(value) for name, value in zip(names, rows[0], strict=True)}


def transient(
    netlist: spice.Netlist, folder: Path, step: float, end: float
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Times, and the voltages of the nodes at each."""
    names, rows = _run(netlist, folder, f"tran {step!r} {end!r} 0 {step!r}")
    columns = dict(zip(names, rows.T, strict=True))
    return columns.pop("time"), columns


def _run(
    netlist: spice.Netlist, folder: Path, command: str
) -> tuple[list[str], NDArray[np.float64]]:
    deck = folder / "deck.sp"
    out = folder / "out.raw"
    text = spice.text(netlist).removesuffix(".end\n").replace(".op\n", "")
    control = f".control\nset filetype=ascii\n{command}\nwrite {out.name} all\n.endc\n"
    deck.write_text(f"{text}.options reltol=1e-6\n{control}.end\n")
    done = subprocess.run(
        ["ngspice", "-b", deck.name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    head, _, body = out.read_text().partition("Values:\n")
    variables = head.partition("Variables:\n")[2].split("\n")
    names = [line.split()[1] for line in variables if line.strip()]
    numbers = [float(word) for word in body.split()]
    rows = np.array(numbers).reshape(-1, len(names) + 1)[:, 1:]
    return [_node(name) for name in names], rows


def _node(name: str) -> str:
    return name.removeprefix("v(").removesuffix(")")
