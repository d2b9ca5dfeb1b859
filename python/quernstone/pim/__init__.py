"""Bit-serial processing in SRAM macros: what toggles, how much of it can, and the product itself.

`macro` says how a macro is built and driven; `array` is a layer programmed into macros; `api`
counts ones and toggles and multiplies bit by bit; `reference` is its plain twin.
"""

from quernstone.pim import reference, reference_lhr
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
from quernstone.pim.codebook import Codebook
from quernstone.pim.fit import FitReport, LayerFit, fit
from quernstone.pim.lhr import (
    hamming_regulariser,
    hamming_regulariser_into,
    mean_hamming_weight,
    symmetric_scales,
)
from quernstone.pim.macro import Count, Macro
from quernstone.pim.mapper import map_exact, map_tasks, mapping_cost

__all__ = [
    "CHIPS",
    "Array",
    "Boosted",
    "Codebook",
    "Control",
    "Count",
    "FitReport",
    "LayerFit",
    "Macro",
    "Report",
    "VfTable",
    "analyze",
    "boost",
    "fit",
    "formulations",
    "hamming_count",
    "hamming_rate",
    "hamming_regulariser",
    "hamming_regulariser_into",
    "hamming_weights",
    "line_toggles",
    "map_exact",
    "map_network",
    "map_tasks",
    "mapping_cost",
    "mean_hamming_weight",
    "mvm",
    "reference",
    "reference_lhr",
    "symmetric_scales",
    "toggle_count",
    "toggle_rate",
]
