"""How numbers become codes of a few bits: the scheme, and nothing of any tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Granularity = Literal["tensor", "channel", "group"]
ScaleKind = Literal["fp32", "bf16", "power-of-two", "two-shift"]

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """A uniform quantiser: value = (code - zero point) x scale.

    Args:
        bits: 2 to 8 a code.
        symmetric: no zero point; codes are signed and 0 is 0. Otherwise codes are
            0 .. 2^bits - 1 and each scale has a zero point among them.
        granularity: what shares a scale: the tensor, a channel (index of the first axis), or
            `group` neighbours along the last axis of a channel.
        group: numbers of a group; 0 unless the granularity is "group". A last group may be
            shorter.
        scale: "fp32"; "bf16", 8 significant bits; "power-of-two", 2^a; "two-shift", 2^a + 2^b or
            2^a, so that a product is two shifts and an addition.
        full_range: a symmetric scheme uses -2^(bits-1) too, and covers the largest magnitude
            with 2^(bits-1) - 1/2 steps instead of 2^(bits-1) - 1.

    Raises:
        ValueError, TypeError: a field is out of range or contradicts another.

    Source: power-of-two scales as in LightMamba (arXiv 2502.15260), section on its quantisation.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group: int = 0
    scale: ScaleKind = "fp32"
    full_range: bool = False

    def __post_init__(self) -> None:
        for name in ("bits", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an int")
        for name in ("symmetric", "full_range"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a bool")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits: got {self.bits}, expected {MIN_BITS} to {MAX_BITS}")
        for name, kinds in (("granularity", Granularity), ("scale", ScaleKind)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {get_args(kinds)}"
                )
        if (self.granularity == "group") != (self.group > 0):
            raise ValueError(
                f"group: got {self.group} with granularity {self.granularity!r}, expected a "
                "positive number with 'group' and 0 otherwise"
            )
        if self.full_range and not self.symmetric:
            raise ValueError("full_range: got True, expected False with an asymmetric scheme")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def lowest(self) -> int:
        """The smallest code."""
        if not self.symmetric:
            return 0
        return -(self.levels // 2) + (0 if self.full_range else 1)

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.levels // 2 - 1 if self.symmetric else self.levels - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Scheme:
        """The scheme that `to_dict` wrote. Raises ValueError where a field is unknown or absent."""
        known = set(cls.__dataclass_fields__)
        if set(fields) != known:
            raise ValueError(f"scheme: got fields {sorted(fields)}, expected {sorted(known)}")
        return cls(**fields)
