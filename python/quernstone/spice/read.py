"""Reading netlists: the grammar's cards with the semantics of `elements`."""

from __future__ import annotations

import os
from pathlib import Path

from quernstone.spice.elements import Reader
from quernstone.spice.error import SpiceError
from quernstone.spice.grammar import Source, cards, read_text
from quernstone.spice.netlist import Netlist


def read(path: str | os.PathLike[str], *, title: bool = False) -> Netlist:
    """Reads a netlist of resistors, capacitors, inductors and sources.

    Args:
        path: of the file; unpacked where it ends in .gz.
        title: the first line is a title, as SPICE itself has it. The power-grid benchmarks begin
            with a comment or an element.

    Returns:
        The netlist. Names are in lower case. Resistors of 0 ohm stay in it: what becomes of them is
        for the solver to say.

    Raises:
        SpiceError: with file and line: a card that is unknown, incomplete or of a name that stands
            twice; a number that is none; a negative resistance; an included file that lies outside
            the netlist's folder; no .end, as in a truncated file.
        OSError: the file cannot be read.

    Source: the formats of the IBM power grid benchmarks (Nassif, ASP-DAC 2008) and of ICCAD 2023
    contest problem C. The oracle is ngspice on the same files.
    """
    file = Path(path)
    return _read(Source(file.parent), str(file), read_text(file), title)


def parse(text: str, *, title: bool = False, name: str = "netlist") -> Netlist:
    """The same of a text, which includes nothing.

    Args:
        name: stands for the file in messages.
    """
    return _read(Source(None), name, text.replace("\r\n", "\n"), title)


def _read(source: Source, name: str, text: str, title: bool) -> Netlist:
    reader = Reader(source)
    reader.read(cards(source, name, text, title=title))
    if not source.ended:
        line = text.rstrip("\n").count("\n") + 1
        raise SpiceError("got no .end, expected one; is the file truncated?", name, line)
    return reader.netlist()
