"""Checks of the arrays that the functions of a macro take."""

from __future__ import annotations

import functools
import operator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from quernstone.pim.macro import MAX_BITS, Macro

Integers: TypeAlias = NDArray[Any] | torch.Tensor


def integers(name: str, values: Integers) -> NDArray[Any]:
    """The array behind a numpy array or a CPU tensor of integers, not copied."""
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{name}.device: got {values.device}, expected cpu")
        if values.is_floating_point() or values.is_complex():
            raise TypeError(f"{name}.dtype: got {values.dtype}, expected integers")
        values = values.detach().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name}: got {type(values).__name__}, expected an array or a tensor")
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}.dtype: got {values.dtype}, expected integers")
    return values


def bits(name: str, value: int) -> int:
    """A number of bits, 1 to 16."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    number = operator.index(value)
    if not 1 <= number <= MAX_BITS:
        raise ValueError(f"{name}: got {number}, expected 1 to {MAX_BITS}")
    return number


def span(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest integer of that many bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


@functools.cache
def holds_all(dtype: np.dtype[Any], bits: int, signed: bool) -> bool:
    """Whether no integer of the dtype is out of the range of the bits."""
    limits = np.iinfo(dtype)
    low, high = span(bits, signed)
    return low <= limits.min and limits.max <= high


def in_range(name: str, values: NDArray[Any], bits: int, signed: bool) -> None:
    """Refuses an integer that the bits do not hold, by its value."""
    if not values.size or holds_all(values.dtype, bits, signed):
        return
    low, high = span(bits, signed)
    for value in (int(values.min()), int(values.max())):
        if not low <= value <= high:
            kind = "signed" if signed else "unsigned"
            raise ValueError(f"{name}: got {value}, expected {low} to {high} ({bits} bits, {kind})")


def weights(values: Integers, macro: Macro) -> NDArray[Any]:
    """[o, i], trailing axes flattened, all within the macro's bits."""
    array = matrix("weights", values)
    in_range("weights", array, macro.weight_bits, macro.weight_signed)
    return array


def inputs(values: Integers, macro: Macro, columns: int) -> NDArray[Any]:
    """[v, i] as wide as the weights, all within the macro's bits."""
    array = integers("inputs", values)
    if array.ndim != 2:
        raise ValueError(f"inputs.ndim: got {array.ndim}, expected 2: vectors, inputs")
    if array.shape[1] != columns:
        raise ValueError(
            f"inputs.shape[1]: got {array.shape[1]}, expected {columns}, the inputs of the weights"
        )
    in_range("inputs", array, macro.input_bits, macro.input_signed)
    return array


def matrix(name: str, values: Integers) -> NDArray[Any]:
    """[o, i]: the first axis, and all others as one."""
    array = integers(name, values)
    if array.ndim < 2:
        raise ValueError(f"{name}.ndim: got {array.ndim}, expected 2 or more: outputs, inputs")
    return array.reshape(array.shape[0], int(np.prod(array.shape[1:])))


def is_macro(macro: Macro) -> None:
    if not isinstance(macro, Macro):
        raise TypeError(f"macro: got {type(macro).__name__}, expected a Macro")
