"""Bit-serial processing in SRAM macros: what toggles, how much of it can, and the product itself.

`macro` says how a macro is built and driven; `array` is a layer programmed into macros; `api`
counts ones and toggles and multiplies bit by bit; `reference` is its plain twin.
"""

from quernstone.pim import reference
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
from quernstone.pim.macro import Count, Macro

__all__ = [
    "Array",
    "Count",
    "Macro",
    "formulations",
    "hamming_count",
    "hamming_rate",
    "hamming_weights",
    "line_toggles",
    "mvm",
    "reference",
    "toggle_count",
    "toggle_rate",
]
