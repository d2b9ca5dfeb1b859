"""Bit-serial processing in SRAM macros: what toggles, how much of it can, and the product itself.

`macro` says how a macro is built and driven; `array` is a layer programmed into macros; `api`
counts ones and toggles and multiplies bit by bit; `reference` is its plain twin.
"""

from quernstone.pim import reference
from quernstone.pim.analysis import Report, analyze, map_network
from quernstone.pim.api import (
    formulations,
    hamming_count,
    hamming_rate,
    hamming_weights,
    line_toggles,
    mvm,
    toggle_count,
    toggle_rate,
)
from quernstone.pim.array import Array
from quernstone.pim.booster import Boosted, Control, boost
from quernstone.pim.chip import CHIPS, VfTable
from quernstone.pim.macro import Count, Macro
from quernstone.pim.mapper import map_exact, map_tasks, mapping_cost

__all__ = [
    "CHIPS",
    "Array",
    "Boosted",
    "Control",
    "Count",
    "Macro",
    "Report",
    "VfTable",
    "analyze",
    "boost",
    "formulations",
    "hamming_count",
    "hamming_rate",
    "hamming_weights",
    "line_toggles",
    "map_exact",
    "map_network",
    "map_tasks",
    "mapping_cost",
    "mvm",
    "reference",
    "toggle_count",
    "toggle_rate",
]
