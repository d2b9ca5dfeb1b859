"""Checks of plain values that several public functions share."""

import math
import sys
from numbers import Integral, Real


def number(where: str, value: object) -> float:
    """The value as an int where it is one, otherwise as a float; it is real and finite."""
    if not isinstance(value, Real):
        raise TypeError(f"{where}: got {type(value).__name__}, expected a real number")
    try:
        result: float = int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # a fraction
        result = math.inf
    if not abs(result) <= sys.float_info.max:
        raise ValueError(f"{where}: got {result}, expected a finite number")
    return result


def text(where: str, value: object, *, empty: bool = False) -> str:
    """The value, a string, which may be `empty` or not."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: got {type(value).__name__}, expected a string")
    if not value and not empty:
        raise ValueError(f"{where}: got an empty string, expected a name")
    return value
