"""Bit-serial processing in SRAM macros: what toggles, how much of it can, and the product itself.

`macro` says how a macro is built and driven; `api` counts ones and toggles and multiplies bit by
bit; `reference` is its plain twin.
"""

from quernstone.pim import reference, reference_lhr
from quernstone.pim.api import hamming_count, hamming_rate, hamming_weights
from quernstone.pim.fit import FitReport, LayerFit, fit
from quernstone.pim.grid import Grid
from quernstone.pim.lhr import (
    hamming_regulariser,
    hamming_regulariser_into,
    mean_hamming_weight,
    symmetric_scales,
)
from quernstone.pim.macro import Count, Macro

__all__ = [
    "Count",
    "FitReport",
    "Grid",
    "LayerFit",
    "Macro",
    "fit",
    "hamming_count",
    "hamming_rate",
    "hamming_regulariser",
    "hamming_regulariser_into",
    "hamming_weights",
    "mean_hamming_weight",
    "reference",
    "reference_lhr",
    "symmetric_scales",
]
