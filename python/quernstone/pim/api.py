"""Ones, toggles and products of bit-serial macros, exact.

Axes: o outputs, i inputs of a layer; v vectors; t cycles; r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from quernstone import _core
from quernstone.pim import checks, reference
from quernstone.pim.array import Array, Formulation, Resolution, line_toggles_of, lines_of, narrowed
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
        return _count_all(checks.integers("weights", weights), checks.bits("bits", bits), signed)
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


def _count_all(array: NDArray[Any], bits: int, signed: bool) -> Count:
    plain = array.dtype.isnative and array.flags.c_contiguous and array.flags.aligned
    if plain and array.size and array.itemsize == (1 if bits <= 8 else 2):
        # One pass over the memory, which also finds what is out of range.
        unsigned = array.dtype.kind == "u"
        dtype = np.dtype(f"i{array.itemsize}")
        if signed == (not unsigned) or bits < 8 * array.itemsize:
            ones, fits = _core.pim.count_ones(array.reshape(-1).view(dtype), bits, signed)
            if fits:
                return Count(np.asarray(ones, np.int64), array.size * bits)
    ones_of_each = hamming_weights(array, bits, signed=signed)
    return Count(np.asarray(ones_of_each.sum(dtype=np.int64)), array.size * bits)


def toggle_count(
    weights: Integers,
    inputs: Integers,
    macro: Macro,
    resolution: Resolution = "bank",
    *,
    formulation: Formulation = "auto",
) -> Count:
    """Counts the cell products that toggle in each cycle; for many inputs see `Array.toggles`.

    Args:
        weights: [o, i, ...] integers of `macro.weight_bits`.
        inputs: [v, i] integers of `macro.input_bits`.
        macro: how the macros are built and driven.
        resolution, formulation: see `Array.toggles`.

    Returns:
        Counts, int32: "bank" [r, t, o], "macro" [r, t, b], "row" [b, t, i].

    Raises:
        ValueError, TypeError: see `Array` and `Array.toggles`.
    """
    return Array(weights, macro).toggles(inputs, resolution, formulation=formulation)


def toggle_rate(
    weights: Integers,
    inputs: Integers,
    macro: Macro,
    resolution: Resolution = "bank",
    *,
    formulation: Formulation = "auto",
) -> NDArray[np.float64]:
    """Rtog: the share of a bank's (macro's, row's) cell products that toggle, cycle by cycle.

    No bank toggles more of its cells than hold a one: Rtog <= HR, equal where every line changes.

    Args:
        weights, inputs, macro, resolution, formulation: see `toggle_count`.

    Returns:
        "bank" [r, t, o], "macro" [r, t, b], "row" [b, t, i], 0 to 1, of the cells of a whole bank,
        macro or row: cells that the layer does not fill count and never toggle.

    Raises:
        ValueError, TypeError: see `toggle_count`.

    Source: AIM (arXiv 2511.04321), our reading of its Rtog. Oracle: `reference.toggles`.
    """
    return toggle_count(weights, inputs, macro, resolution, formulation=formulation).rate


def line_toggles(inputs: Integers, macro: Macro) -> NDArray[np.uint8]:
    """Which row lines change in each cycle.

    Args:
        inputs: [v, i] integers of `macro.input_bits`.
        macro: how its lines are driven.

    Returns:
        uint8 [t, i], 1 where a line changes.

    Raises:
        ValueError, TypeError: inputs of another shape, dtype or range.
    """
    checks.is_macro(macro)
    array = checks.integers("inputs", inputs)
    width = array.shape[1] if array.ndim == 2 else 0
    x = narrowed(checks.inputs(array, macro, width), macro.input_bits)
    return line_toggles_of(x, lines_of(macro), macro).reshape(-1, width)


def mvm(
    weights: Integers, inputs: Integers, macro: Macro, *, formulation: Formulation = "auto"
) -> NDArray[np.int64]:
    """The product that a macro computes bit by bit, equal to that of the integers.

    Args:
        weights, inputs, macro, formulation: see `toggle_count`.

    Returns:
        [v, o] int64.

    Raises:
        ValueError, TypeError: see `toggle_count`.
    """
    return Array(weights, macro).mvm(inputs, formulation=formulation)


def formulations() -> list[str]:
    """The formulations of counts that this processor and the level in use have."""
    return _core.pim.formulations()
