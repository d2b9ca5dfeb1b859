"""Shapes and flags of the sweep, chosen so that every two values meet in some case."""

import random
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from .cases import DTYPES, KINDS, PADDINGS, Case

# 1, n - 1, n, n + 1, 3 n and their neighbours for vectors of 8 and 16 lanes and blocks of 32, 64
# and 128; primes, so that nothing divides.
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65, 95, 96, 97, 127, 129, 193)

AXES: dict[str, tuple[Any, ...]] = {
    "queries": LENGTHS,
    "keys": LENGTHS,
    "width": (16, 17, 20, 31, 32, 63, 64, 65, 80, 96, 127, 128, 160, 192, 255, 256),
    "kind": KINDS,
    "dtype": DTYPES,
    "causal": (True, False),
    "window": (None, 1, 5, 16, 48),
    "padding": PADDINGS,
    "batch": (1, 2, 3),
    "key_heads": (1, 2),
    "ratio": (1, 2, 3, 4, 8),
    "scale": (None, -0.5, 0.0),
    "some_tokens": (False, True),
    "aux": (False, True),
}


def every_pair(candidates: int = 20) -> list[Case]:
    """Cases in which any two values of any two axes occur together, found greedily."""

    def pairs(case: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        return combinations(case.items(), 2)

    rng = random.Random(0)
    left = dict.fromkeys(
        ((a, x), (b, y)) for a, b in combinations(AXES, 2) for x in AXES[a] for y in AXES[b]
    )
    cases = []
    while left:
        fixed = dict(next(iter(left)))
        tries = [
            {name: fixed.get(name, rng.choice(values)) for name, values in AXES.items()}
            for _ in range(candidates)
        ]
        best = max(tries, key=lambda case: sum(pair in left for pair in pairs(case)))
        for pair in pairs(best):
            left.pop(pair, None)
        cases.append(Case(**best))
    return cases


def every_flag(kind: str, dtype: Any) -> list[Case]:
    """All masks that can interact, at one shape with a part block and grouped heads."""
    return [
        Case(
            kind=kind, dtype=dtype, ratio=3, queries=41, keys=keys, width=48,
            causal=causal, window=window, padding=padding, some_tokens=some_tokens, aux=aux,
        )
        for keys in (41, 70)
        for causal in (True, False)
        for window in (None, 6, 37)
        for padding in PADDINGS
        for some_tokens, aux in ((False, False), (False, True), (True, True))
    ]  # fmt: skip
