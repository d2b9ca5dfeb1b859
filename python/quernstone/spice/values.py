"""Numbers as SPICE writes them: 4.7k, 10pF, 1meg."""

import math
import re

# Whole powers, so that a product or quotient is rounded once: 4.7k is 4700.0 exactly.
_LARGE = {"": 1.0, "t": 1e12, "g": 1e9, "meg": 1e6, "k": 1e3}
_SMALL = {"m": 1e3, "u": 1e6, "n": 1e9, "p": 1e12, "f": 1e15}
_MIL = 25.4e-6
_PLAIN = frozenset("0123456789+-.e")
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(meg|mil|[tgkmunpf]?)([a-z]*)")


def number(text: str) -> float:
    """The value of a number with an optional factor and unit.

    Factors are t g meg k m u n p f and mil, in either case. Letters after a factor, or letters that
    are none, are a unit and mean nothing: "10pF" and "10p" are the same, "1F" is 1e-15.

    Raises:
        ValueError: the text is no finite number.
    """
    try:
        value = float(text) if _PLAIN.issuperset(text) else _scaled(text)
    except ValueError:
        raise ValueError(f"got {text!r}, expected a number") from None
    if not math.isfinite(value):
        raise ValueError(f"got {text!r}, expected a finite number")
    return value


def _scaled(text: str) -> float:
    match = _NUMBER.fullmatch(text.lower())
    if match is None:
        raise ValueError
    value, factor = float(match[1]), match[2]
    if factor in _LARGE:
        return value * _LARGE[factor]
    return value / _SMALL[factor] if factor in _SMALL else value * _MIL
