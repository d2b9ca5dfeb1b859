"""Netlists in SPICE's format, as power-grid benchmarks use it: read, written, solved elsewhere.

`grammar` knows files, lines and words, `elements` what they mean; `values` and `waves` the numbers
and sources, `netlist` what comes of it.
"""

from quernstone.spice.error import SpiceError
from quernstone.spice.netlist import GROUND, Branches, Netlist
from quernstone.spice.read import parse, read
from quernstone.spice.values import number
from quernstone.spice.waves import Corners, Pulse, Wave
from quernstone.spice.write import text, write

__all__ = [
    "GROUND",
    "Branches",
    "Corners",
    "Netlist",
    "Pulse",
    "SpiceError",
    "Wave",
    "number",
    "parse",
    "read",
    "text",
    "write",
]
