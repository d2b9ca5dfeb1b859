"""Bit-serial processing in SRAM macros: what toggles, how much of it can, and the product itself.

`macro` says how a macro is built and driven; `api` counts ones and toggles and multiplies bit by
bit; `reference` is its plain twin.
"""

from quernstone.pim import reference
from quernstone.pim.api import hamming_count, hamming_rate, hamming_weights
from quernstone.pim.macro import Count, Macro

__all__ = [
    "Count",
    "Macro",
    "hamming_count",
    "hamming_rate",
    "hamming_weights",
    "reference",
]
