"""What `api` computes, as plain as numpy can say it; never on the fast path.

Axes: o outputs, i inputs, v vectors, t cycles, r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernstone.pim.macro import Macro


def hamming_weights(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Ones of each integer in two's complement of that many bits."""
    mask = (1 << bits) - 1
    ones: NDArray[np.uint8] = np.bitwise_count(values.astype(np.int64) & mask)
    return ones


def line_levels(inputs: NDArray[Any], macro: Macro) -> NDArray[np.uint8]:
    """The level of each line in each cycle, [t, i]; a line that is gated keeps its level."""
    vectors, width = inputs.shape
    order = range(macro.input_bits) if macro.order == "lsb" else range(macro.input_bits)[::-1]
    levels = []
    level = np.zeros(width, np.uint8)
    for x in inputs.astype(np.int64):
        gated = (x == 0) if macro.zero_gating else np.zeros(width, bool)
        for bit in order:
            level = np.where(gated, level, (x >> bit) & 1).astype(np.uint8)
            levels.append(level)
        for _ in range(macro.idle):
            level = np.zeros(width, np.uint8)
            levels.append(level)
    return np.array(levels, np.uint8).reshape(vectors * macro.cycles_per_vector, width)


def line_toggles(inputs: NDArray[Any], macro: Macro) -> NDArray[np.uint8]:
    """Which lines change, [t, i]; all are at 0 before the first cycle."""
    levels = line_levels(inputs, macro)
    toggles = levels ^ np.vstack([np.zeros_like(levels[:1]), levels[:-1]])
    if not macro.cross_vector:
        toggles[:: macro.cycles_per_vector] = 0
    return toggles


def toggles(weights: NDArray[Any], inputs: NDArray[Any], macro: Macro) -> NDArray[np.int64]:
    """Cell products that toggle, [r, t, o]."""
    rows, _ = macro.tiles(*weights.shape)
    lines = line_toggles(inputs, macro)
    mask = (1 << macro.weight_bits) - 1
    cells = weights.astype(np.int64) & mask
    out = np.zeros((rows, len(lines), len(weights)), np.int64)
    for r in range(rows):
        part = slice(r * macro.rows, (r + 1) * macro.rows)
        for t, changes in enumerate(lines[:, part]):
            # A product toggles where its line changes and its cell holds a one.
            toggled = np.where(changes, cells[:, part], 0)
            out[r, t] = np.bitwise_count(toggled).sum(axis=1)
    return out


def macro_toggles(weights: NDArray[Any], inputs: NDArray[Any], macro: Macro) -> NDArray[np.int64]:
    """Those of all banks of a macro, [r, t, b]."""
    each = toggles(weights, inputs, macro)
    first = range(0, len(weights), macro.banks)
    return np.stack([each[:, :, o : o + macro.banks].sum(axis=2) for o in first], axis=2)


def packed_planes(values: NDArray[Any], bits: int) -> NDArray[np.uint64]:
    """[bits, n, i / 64] bit planes of [n, i], 64 integers of a row in a word."""
    padded = np.pad(values.astype(np.int64), ((0, 0), (0, -values.shape[1] % 64)))
    planes = np.stack([(padded >> bit) & 1 for bit in range(bits)]).astype(np.uint8)
    return np.packbits(planes, axis=2, bitorder="little").view(np.uint64)


def mvm(weights: NDArray[Any], inputs: NDArray[Any], macro: Macro) -> NDArray[np.int64]:
    """The product by ones of ANDed bit planes, each with the weight of its two bits: [v, o]."""
    cells = packed_planes(weights, macro.weight_bits)
    lines = packed_planes(inputs, macro.input_bits)
    out = np.zeros((len(inputs), len(weights)), np.int64)
    for line_bit, line in enumerate(lines):
        for cell_bit, cell in enumerate(cells):
            ones = np.bitwise_count(line[:, None] & cell).sum(axis=2, dtype=np.int64)
            negative = (macro.input_signed and line_bit == macro.input_bits - 1) != (
                macro.weight_signed and cell_bit == macro.weight_bits - 1
            )
            out += (-ones if negative else ones) << (line_bit + cell_bit)
    return out
