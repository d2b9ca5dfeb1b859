"""Layers and inputs for the tests of macros."""

import numpy as np
from numpy.typing import NDArray

from quernstone.pim import Macro
from quernstone.pim.checks import span


def drawn(
    shape: tuple[int, ...], bits: int, signed: bool = True, seed: int = 0, zeros: float = 0.0
) -> NDArray[np.int64]:
    """Integers over the whole range of the bits, a share of them replaced by zeros."""
    rng = np.random.default_rng(seed)
    low, high = span(bits, signed)
    values = rng.integers(low, high + 1, shape)
    return np.where(rng.random(shape) < zeros, 0, values)


def layer(
    macro: Macro, outputs: int, inputs: int, vectors: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Weights [o, i] and inputs [v, i] of a macro; a third of the inputs are 0."""
    weights = drawn((outputs, inputs), macro.weight_bits, macro.weight_signed, seed)
    x = drawn((vectors, inputs), macro.input_bits, macro.input_signed, seed + 1, zeros=1 / 3)
    return weights, x
