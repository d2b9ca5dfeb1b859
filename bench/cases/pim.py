"""The macro and the inputs of the benchmarks of bit-serial counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quernstone.pim import Macro, reference

MACRO = Macro()
VECTORS = 256


@dataclass(frozen=True)
class CountCase:
    """`what` of one macro of 512 rows and 64 banks, by one formulation or the fastest."""

    what: str
    threads: int
    formulation: str = "auto"
    quick: bool = False

    @property
    def id(self) -> str:
        own = "" if self.formulation == "auto" else f".{self.formulation}"
        return f"pim.{self.what}.512x64.w8x8.v256{own}.t{self.threads}"


def weights() -> NDArray[np.int8]:
    """[o, i] over all of int8."""
    shape = (MACRO.banks, MACRO.rows)
    return np.random.default_rng(0).integers(-128, 128, shape, np.int8)


def inputs() -> NDArray[np.int8]:
    """[v, i] over all of int8."""
    return np.random.default_rng(1).integers(-128, 128, (VECTORS, MACRO.rows), np.int8)


def operations() -> int:
    """Cells times cycles: whether each cell's product toggles in each cycle."""
    return MACRO.cells * VECTORS * MACRO.cycles_per_vector


def line_bits() -> NDArray[np.int8]:
    """[t, i] of 0 and 1, ready for a matrix product."""
    return reference.line_toggles(inputs(), MACRO).astype(np.int8)


def ones() -> NDArray[np.int8]:
    """[i, o] ones of each weight."""
    return reference.hamming_weights(weights(), 8).T.astype(np.int8)
