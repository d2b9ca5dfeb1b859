"""The adder trees of a macro in Python's own integers: readable and slow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernstone.pim.macro import Macro


def adder_tree_toggles(
    weights: NDArray[Any], inputs: NDArray[Any], macro: Macro
) -> NDArray[np.int64]:
    """As `currents.adder_tree_toggles`; also checks that accumulators end with the product."""
    row_tiles, bank_tiles = macro.tiles(*weights.shape)
    depth = (macro.rows - 1).bit_length()
    cycles = len(inputs) * macro.input_bits
    out = np.zeros((cycles, row_tiles, bank_tiles, depth + 2), np.int64)
    for output, row in enumerate(weights.tolist()):
        for r in range(row_tiles):
            w = row[r * macro.rows : (r + 1) * macro.rows]
            x = inputs[:, r * macro.rows : (r + 1) * macro.rows].tolist()
            out[:, r, output // macro.banks] += _bank(w, x, macro, depth)
    return out


def _bank(w: list[int], x: list[list[int]], macro: Macro, depth: int) -> NDArray[np.int64]:
    width = macro.weight_bits
    order = range(macro.input_bits)
    before = [[0] * macro.rows for _ in range(depth + 1)]
    accumulator = 0
    found = []
    for vector in x:
        total = 0
        for bit in order if macro.order == "lsb" else reversed(order):
            sums = [[(xi >> bit & 1) * wi for xi, wi in zip(vector, w, strict=True)]]
            sums[0] += [0] * (macro.rows - len(w))
            for _ in range(depth):
                below = sums[-1] + [0] * (len(sums[-1]) % 2)
                sums.append([a + b for a, b in zip(below[::2], below[1::2], strict=True)])
            counts = [
                sum(_changed(a, b, width + level) for a, b in zip(now, then, strict=False))
                for level, (now, then) in enumerate(zip(sums, before, strict=True))
            ]
            negative = macro.input_signed and bit == macro.input_bits - 1
            total += (-1 if negative else 1) * (sums[-1][0] << bit)
            counts.append(_changed(total, accumulator, width + depth + macro.input_bits))
            before, accumulator = sums, total
            found.append(counts)
        assert total == sum(xi * wi for xi, wi in zip(vector, w, strict=True))
    return np.array(found, np.int64)


def _changed(a: int, b: int, width: int) -> int:
    return ((a ^ b) & ((1 << width) - 1)).bit_count()
