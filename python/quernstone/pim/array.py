"""A layer programmed into macros: its toggles and its product for any inputs.

Axes: o outputs, i inputs of the layer; v vectors; t cycles; r tiles of rows, b tiles of banks.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernstone import _core
from quernstone.pim import checks
from quernstone.pim.checks import Integers
from quernstone.pim.macro import Count, Macro

Resolution = Literal["bank", "macro", "row"]
Formulation = Literal["auto", "table", "dot", "tiles"]
_RESOLUTIONS = get_args(Resolution)
_ALIGN = 64
_BYTE, _PAIR = np.dtype(np.int8), np.dtype(np.int16)


class Array:
    """Weights as they lie in macros, kept so that any number of inputs can be counted.

    Args:
        weights: [o, i, ...] integers of `macro.weight_bits`; the axes after the first are one
            axis i of inputs.
        macro: how the macros are built and driven, and how the layer is tiled over them.

    Raises:
        ValueError: a weight out of range, a shape without two axes.
        TypeError: weights that are no integers, a macro that is none.
    """

    def __init__(self, weights: Integers, macro: Macro) -> None:
        checks.is_macro(macro)
        matrix = checks.weights(weights, macro)
        self.macro = macro
        self.outputs, self.inputs = matrix.shape
        self._weights = narrowed(matrix, macro.weight_bits)
        self._lines = lines_of(macro)
        self._tiles = macro.tiles(self.outputs, self.inputs)
        self._cycles = macro.cycles_per_vector

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of rows and of banks."""
        return self._tiles

    @property
    def padding(self) -> float:
        """Share of the tiles' cells that no weight fills; they count in every rate."""
        return self.macro.padding(self.outputs, self.inputs)

    def cycles(self, vectors: int) -> int:
        """Of so many vectors, idle ones included."""
        return vectors * self._cycles

    def toggles(
        self,
        inputs: Integers,
        resolution: Resolution = "bank",
        *,
        formulation: Formulation = "auto",
        out: NDArray[np.int32] | None = None,
    ) -> Count:
        """Counts the cell products that toggle in each cycle.

        Results depend neither on the number of threads nor on the formulation.

        Args:
            inputs: [v, i] integers of `macro.input_bits`.
            resolution: "bank": every output of every tile of rows; "macro": every tile; "row":
                every input, over the banks of a tile.
            formulation: "table" looks up sums of four rows, "dot" multiplies bytes in vector
                registers, "tiles" in AMX tiles; "auto" is the fastest of this level. "row" has
                only one.
            out: int32 memory for the counts, in the shape that is returned. Counts are written
                quickest where it starts with a cache line, as the memory that is made for None.

        Returns:
            Counts, int32: "bank" [r, t, o]; "macro" [r, t, b]; "row" [b, t, i]. Cells are those of
            a whole bank, macro or row of a macro, padding included.

        Raises:
            ValueError: an input out of range, a shape that does not fit, a formulation that this
                processor or level does not have.
            TypeError: inputs that are no integers.

        Source: AIM (arXiv 2511.04321), our reading of its Rtog. Oracles: `reference.toggles`,
        numpy's `bitwise_count`.
        """
        x = self._inputs(inputs)
        if resolution not in _RESOLUTIONS:
            raise ValueError(f"resolution: got {resolution!r}, expected one of {_RESOLUTIONS}")
        cycles = self.cycles(len(x))
        rows, banks = self.tiles
        if resolution == "row":
            return self._row_toggles(x, formulation, out)
        columns = self.outputs if resolution == "bank" else banks
        counts = place(out, (rows, cycles, columns))
        layer, data = self._ones if resolution == "bank" else self._row_ones
        _core.pim.toggles(layer, data, self._lines, x, formulation, counts)
        cells = self.macro.bank_cells if resolution == "bank" else self.macro.cells
        return Count(counts, cells)

    def mvm(self, inputs: Integers, *, formulation: Formulation = "auto") -> NDArray[np.int64]:
        """Weights times each vector, one input bit a cycle, shifted and added: exact.

        Args:
            inputs: [v, i] integers of `macro.input_bits`.
            formulation: see `toggles`.

        Returns:
            [v, o] int64.

        Raises:
            ValueError, TypeError: see `toggles`.

        Oracle: integer matrix products of numpy and torch.
        """
        x = self._inputs(inputs)
        out = np.empty((len(x), self.outputs), np.int64)
        layer, data = self._digits
        _core.pim.mvm(layer, data, self._lines, x, formulation, out)
        return out

    def _inputs(self, inputs: Integers) -> NDArray[Any]:
        array = checks.inputs(inputs, self.macro, self.inputs)
        return narrowed(array, self.macro.input_bits)

    def _row_toggles(
        self, x: NDArray[Any], formulation: Formulation, out: NDArray[np.int32] | None
    ) -> Count:
        if formulation not in ("auto", "table"):
            raise ValueError(f"formulation: got {formulation!r}, expected 'auto' for rows")
        changes = line_toggles_of(x, self._lines, self.macro)
        banks = self.tiles[1]
        counts = place(out, (banks, self.cycles(len(x)), self.inputs))
        for tile, ones in enumerate(self._ones_of_rows):
            np.multiply(changes.reshape(-1, self.inputs), ones, out=counts[tile])
        return Count(counts, self.macro.banks * self.macro.weight_bits)

    @functools.cached_property
    def _ones_of_rows(self) -> NDArray[np.int32]:
        """[b, i]"""
        ones = np.bitwise_count(
            self._weights.astype(np.int64) & ((1 << self.macro.weight_bits) - 1)
        )
        banks = self.tiles[1]
        padded = np.zeros((banks * self.macro.banks, self.inputs), np.int32)
        padded[: self.outputs] = ones
        tiled = padded.reshape(banks, self.macro.banks, self.inputs)
        found: NDArray[np.int32] = tiled.sum(axis=1, dtype=np.int32)
        return found

    @functools.cached_property
    def _ones(self) -> tuple[_core.pim.Layer, NDArray[np.uint8]]:
        return self._programmed("ones")

    @functools.cached_property
    def _row_ones(self) -> tuple[_core.pim.Layer, NDArray[np.uint8]]:
        return self._programmed("row_ones")

    @functools.cached_property
    def _digits(self) -> tuple[_core.pim.Layer, NDArray[np.uint8]]:
        return self._programmed("weights")

    def _programmed(self, content: str) -> tuple[_core.pim.Layer, NDArray[np.uint8]]:
        macro = self.macro
        layer = _core.pim.Layer(
            content,
            self.outputs,
            self.inputs,
            macro.rows,
            macro.banks,
            macro.weight_bits,
            macro.weight_signed,
        )
        data = aligned(layer.bytes)
        _core.pim.program(layer, self._weights, data)
        return layer, data


def lines_of(macro: Macro) -> _core.pim.Lines:
    return _core.pim.Lines(
        macro.input_bits,
        macro.idle,
        macro.order == "msb",
        macro.input_signed,
        macro.cross_vector,
        macro.zero_gating,
    )


def line_toggles_of(x: NDArray[Any], lines: _core.pim.Lines, macro: Macro) -> NDArray[np.uint8]:
    """[v, cycles of a vector, i], 1 where a line changes."""
    out = np.empty((len(x), macro.cycles_per_vector, x.shape[1]), np.uint8)
    _core.pim.line_toggles(lines, x, out)
    return out


def narrowed(array: NDArray[Any], bits: int) -> NDArray[Any]:
    """The same bits as int8 or int16, contiguous along the last axis."""
    dtype = _BYTE if bits <= 8 else _PAIR
    if array.dtype is dtype and array.size and array.flags.carray:
        return array
    same = array.dtype.itemsize == dtype.itemsize and array.dtype.isnative
    # Unsigned values that are within the bits wrap.
    array = array.view(dtype) if same else array.astype(dtype)
    aligned = array.flags.aligned and all(step % dtype.itemsize == 0 for step in array.strides)
    if array.strides[-1] != dtype.itemsize or not array.size or not aligned:
        array = np.array(array, order="C")
    return array


def aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes that start with a cache line."""
    memory = np.empty(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + size]


def place(out: NDArray[np.int32] | None, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """`out` if it is memory for so many counts; None: memory that starts with a cache line."""
    if out is None:
        return aligned(4 * math.prod(shape)).view(np.int32).reshape(shape)
    if not isinstance(out, np.ndarray) or out.dtype != np.int32:
        got = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(f"out: got {got}, expected an array of int32")
    if out.shape != shape:
        raise ValueError(f"out.shape: got {out.shape}, expected {shape}")
    return out
