"""Writing netlists that `read` and other simulators take."""

from __future__ import annotations

import os
from collections.abc import Iterator

from quernstone._files import write_whole
from quernstone.spice.netlist import Branches, Netlist


def write(netlist: Netlist, path: str | os.PathLike[str], *, comment: str = "netlist") -> None:
    """Writes a netlist; a file of that name stays whole until it is replaced.

    The first line is a comment, so it is the same with and without a title. Numbers are written
    such that they are read as the same float64.
    """
    write_whole(path, text(netlist, comment=comment).encode())


def text(netlist: Netlist, *, comment: str = "netlist") -> str:
    """What `write` writes."""
    lines = ["* " + " ".join(comment.split())]
    for branches in (
        netlist.resistors,
        netlist.capacitors,
        netlist.inductors,
        netlist.currents,
        netlist.voltages,
    ):
        lines += _cards(netlist, branches)
    lines += [" ".join(words) for words in netlist.controls]
    return "\n".join([*lines, ".end", ""])


def _cards(netlist: Netlist, branches: Branches) -> Iterator[str]:
    nodes, waves = netlist.nodes, branches.waves
    columns = zip(
        branches.names,
        branches.plus.tolist(),
        branches.minus.tolist(),
        branches.values.tolist(),
        strict=True,
    )
    for i, (name, plus, minus, value) in enumerate(columns):
        wave = f" {waves[i].words()}" if i in waves else ""
        yield f"{name} {nodes[plus]} {nodes[minus]} {'dc ' if wave else ''}{value!r}{wave}"
