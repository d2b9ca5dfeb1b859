"""Types that the attention functions share."""

from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["sink", "vanilla", "gated"]


class Aux(NamedTuple):
    """What a forward pass knows beside its output.

    Axes: b batch, h query heads, t queries.
    """

    lse: Tensor
    """[b, h, t] fp32, nats: log-sum-exp over the visible keys, the sink left out."""
    importance: Tensor
    """[h] fp32: mean gate over the counted tokens (and channels of an element-wise gate)."""
