"""Ones, toggles and products of bit-serial macros, exact.

Axes: o outputs, i inputs of a layer; v vectors; t cycles; r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from quernstone.pim import checks, reference
from quernstone.pim.checks import Integers
from quernstone.pim.macro import Count, Macro

Per = Literal["all", "row", "bank", "macro"]
_PER = ("all", "row", "bank", "macro")


def hamming_weights(weights: Integers, bits: int, *, signed: bool = True) -> NDArray[np.uint8]:
    """Ones of each weight in two's complement.

    Args:
        weights: integers of any shape, an array or a CPU tensor.
        bits: of a weight, 1 to 16.
        signed: whether `bits` holds -2^(bits-1) to 2^(bits-1) - 1, or 0 to 2^bits - 1.

    Returns:
        uint8 in the shape of the weights.

    Raises:
        ValueError: bits, or a weight, out of range.
        TypeError: weights that are no integers.
    """
    array = checks.integers("weights", weights)
    checks.in_range("weights", array, checks.bits("bits", bits), signed)
    return reference.hamming_weights(array, bits)


def hamming_count(
    weights: Integers,
    bits: int,
    *,
    signed: bool = True,
    per: Per = "all",
    macro: Macro | None = None,
) -> Count:
    """Counts the ones of weights, and the cells that could hold one.

    Args:
        weights: integers; for "all" of any shape, otherwise [o, i, ...], where the axes after the
            first are one axis i of inputs.
        bits: of a weight, 1 to 16.
        signed: see `hamming_weights`.
        per: "all" of the weights together; each "row" (input), each "bank" (output), or each
            "macro" that a layer is tiled over.
        macro: for "macro"; its cells that no weight fills count as zeros.

    Returns:
        Counts [] for "all", [i], [o], or [r, b].

    Raises:
        ValueError: bits, a weight, `per` or the shape is not as described.
        TypeError: weights that are no integers, `macro` missing.
    """
    if per not in _PER:
        raise ValueError(f"per: got {per!r}, expected one of {_PER}")
    if per == "all":
        ones = hamming_weights(weights, bits, signed=signed)
        return Count(np.asarray(ones.sum(dtype=np.int64)), ones.size * bits)
    matrix = checks.matrix("weights", weights)
    ones = hamming_weights(matrix, bits, signed=signed)
    outputs, inputs = matrix.shape
    if per == "row":
        return Count(ones.sum(axis=0, dtype=np.int64), outputs * bits)
    if per == "bank":
        return Count(ones.sum(axis=1, dtype=np.int64), inputs * bits)
    if macro is None:
        raise TypeError("macro: got None, expected a Macro with per='macro'")
    checks.is_macro(macro)
    if macro.weight_bits != bits:
        raise ValueError(f"bits: got {bits}, expected {macro.weight_bits}, those of the macro")
    rows, banks = macro.tiles(outputs, inputs)
    padded = np.zeros((banks * macro.banks, rows * macro.rows), np.uint8)
    padded[:outputs, :inputs] = ones
    tiled = padded.reshape(banks, macro.banks, rows, macro.rows)
    return Count(tiled.sum(axis=(1, 3), dtype=np.int64).T, macro.cells)


@overload
def hamming_rate(
    weights: Integers,
    bits: int,
    *,
    per: Literal["all"] = "all",
    signed: bool = True,
    macro: Macro | None = None,
) -> float: ...
@overload
def hamming_rate(
    weights: Integers,
    bits: int,
    *,
    per: Literal["row", "bank", "macro"],
    signed: bool = True,
    macro: Macro | None = None,
) -> NDArray[np.float64]: ...
def hamming_rate(
    weights: Integers,
    bits: int,
    *,
    per: Per = "all",
    signed: bool = True,
    macro: Macro | None = None,
) -> float | NDArray[np.float64]:
    """The share of ones among the bits of weights, HR: no input toggles more of a bank's cells.

    Args:
        weights, bits, per, signed, macro: see `hamming_count`.

    Returns:
        A float for "all", otherwise [i], [o] or [r, b].

    Raises:
        ValueError, TypeError: see `hamming_count`; no weights at all.

    Source: AIM (arXiv 2511.04321), our reading of its Hamming rate. Oracle: `numpy.bitwise_count`.
    """
    count = hamming_count(weights, bits, signed=signed, per=per, macro=macro)
    if not count.cells:
        raise ValueError("weights: got none, expected at least one")
    rate = count.rate
    return float(rate) if per == "all" else rate
