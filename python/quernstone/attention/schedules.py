"""The weight of the head-balance loss over the optimiser steps, which count from 0."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(weight: float) -> Schedule:
    """`weight` at every step."""
    return lambda step: weight


def linear_warmup(weight: float, steps: int) -> Schedule:
    """From 0 at step 0 in a line to `weight` at step `steps`, and on with it."""
    _positive("steps", steps)
    return lambda step: weight * min(1.0, step / steps)


def cosine(weight: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """A linear warm-up over `warmup` steps, then half a cosine down to `final` at step `steps`."""
    _positive("steps - warmup", steps - warmup)
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}, expected 0 or more")

    def at(step: int) -> float:
        if step < warmup:
            return weight * step / warmup
        done = min(1.0, (step - warmup) / (steps - warmup))
        return final + (weight - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return at


def _positive(name: str, x: int) -> None:
    if x < 1:
        raise ValueError(f"{name}: got {x}, expected 1 or more")
