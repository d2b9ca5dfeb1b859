"""Sources that change with time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pulse:
    """PULSE(low high delay rise fall width period); a period of 0 is one pulse.

    Rise and fall are positive: what SPICE makes of 0 depends on the step.
    """

    low: float
    high: float
    delay: float
    rise: float
    fall: float
    width: float
    period: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delay", "width", "period"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name}: got {getattr(self, name):g}, expected 0 or more")
        for name in ("rise", "fall"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}: got {getattr(self, name):g}, expected more than 0")
        length = self.rise + self.width + self.fall
        if 0.0 < self.period < length * (1 - 1e-12):
            raise ValueError(
                f"period: got {self.period:g}, expected at least the pulse, {length:g}"
            )

    def at(self, time: Floats) -> Floats:
        """The value at each time in seconds."""
        t = np.asarray(time, np.float64) - self.delay
        if self.period:
            t = np.where(t > 0.0, np.mod(t, self.period), t)
        ends = np.cumsum([0.0, self.rise, self.width, self.fall])
        return np.interp(t, ends, [self.low, self.high, self.high, self.low])

    def words(self) -> str:
        """As a netlist has it."""
        values = [self.low, self.high, self.delay, self.rise, self.fall, self.width]
        values += [self.period] if self.period else []
        return f"PULSE({' '.join(map(repr, values))})"


@dataclass(frozen=True)
class Corners:
    """PWL(t v t v ...): straight lines between corners, constant before and after."""

    times: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.values):
            raise ValueError(
                f"corners: got {len(self.times)} times and {len(self.values)} values, "
                "expected as many"
            )
        if np.any(np.diff(self.times) <= 0.0):
            raise ValueError("corners: got times that do not grow, expected growing ones")

    def at(self, time: Floats) -> Floats:
        """The value at each time in seconds."""
        return np.interp(np.asarray(time, np.float64), self.times, self.values)

    def words(self) -> str:
        """As a netlist has it."""
        pairs = zip(self.times, self.values, strict=True)
        return f"PWL({' '.join(f'{time!r} {value!r}' for time, value in pairs)})"


Wave = Pulse | Corners
