"""How many slots each layer's cache gets out of a common budget.

Axes: l layers, t slots of a layer (0 to N).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone.allocate import allocate
from quernstone.moe.cache.base import whole
from quernstone.moe.cache.policies import Policy
from quernstone.moe.replay import replay
from quernstone.moe.trace import Trace


@dataclass(frozen=True)
class LayerUse:
    """How a layer uses its experts, as far as a model without their names goes."""

    experts: int
    active: Mapping[int, float]
    """Share of the tokens that activate k experts, by k; they sum to 1."""
    prefetch_accuracy: float = 0.0
    """Probability that a prefetched expert is one that is needed: 0 to 1."""

    def __post_init__(self) -> None:
        whole("experts", self.experts, 1)
        if not self.active:
            raise ValueError("active: got no share, expected one at least")
        for k, share in self.active.items():
            if not 0 <= whole("active", k) <= self.experts:
                raise ValueError(f"active: got {k} experts, expected 0 to {self.experts}")
            if not share >= 0.0:
                raise ValueError(f"active[{k}]: got {share}, expected 0 or more")
        total = math.fsum(self.active.values())
        if not math.isclose(total, 1.0, rel_tol=0.0, abs_tol=1e-6):
            raise ValueError(f"active: got shares that sum to {total}, expected 1")
        if not 0.0 <= self.prefetch_accuracy <= 1.0:
            raise ValueError(
                f"prefetch_accuracy: got {self.prefetch_accuracy}, expected 0.0 to 1.0"
            )


class SlotPlan(NamedTuple):
    slots: tuple[int, ...]
    """[l]"""
    loss: float
    """Sum of the layers' curves there: loads that a token waits for, over all layers."""


def expected_loads(use: LayerUse) -> NDArray[np.float64]:
    """[N + 1]: loads that a token waits for in a layer, by its slots, if any expert is as likely.

    f(t) = sum over k of p_k [ k (N - t) / N - beta (1 - C(t, k) / C(N, k)) ]: of k experts drawn
    from N without preference, k (N - t) / N are absent on average; and where one is (the k are not
    all among the t), one load has been begun by a prefetch that is right with probability beta.

    Source: AdapMoE, arXiv 2408.10284, section on cache allocation, which has N = 8 and k of 1 or
    2, here for any N and k. Oracles: that formula, and exhaustive enumeration of draws.
    """
    n, beta = use.experts, use.prefetch_accuracy
    curve = np.zeros(n + 1)
    for k, share in use.active.items():
        for t in range(n + 1):
            complete = math.comb(t, k) / math.comb(n, k)
            curve[t] += share * (k * (n - t) / n - beta * (1.0 - complete))
    return curve


def measured_loads(
    trace: Trace, policy: Policy = "lru", *, prefetch_accuracy: float | Sequence[float] = 0.0
) -> NDArray[np.float64]:
    """[l, N + 1]: the same from a trace, replayed through a policy with 0 to N slots.

    It is better than `expected_loads` where there is a trace: it knows that some experts are
    chosen more often than others and soon again, which the formula denies. A cache hits more than
    t / N, and how much more differs from layer to layer, which is what the allocation is about.

    Args:
        trace: the routing of a model, as it will be served; one step of it is what waits.
        policy: of the caches that will be used.
        prefetch_accuracy: beta of all layers, or of each.
    """
    beta = np.broadcast_to(np.asarray(prefetch_accuracy, dtype=np.float64), (trace.layers,))
    if not ((beta >= 0.0) & (beta <= 1.0)).all():
        raise ValueError(f"prefetch_accuracy: got {prefetch_accuracy}, expected 0.0 to 1.0")
    curve = replay(trace, policy, range(trace.experts + 1))
    misses = curve.requests - curve.hits
    loads: NDArray[np.float64] = (misses - beta * curve.stalls).T / curve.steps
    return loads


def allocate_slots(
    layers: Sequence[LayerUse | ArrayLike], total: int, *, least: int = 0
) -> SlotPlan:
    """The slots of each layer with the smallest sum of loads, at most `total` together.

    Args:
        layers: of each layer what is known of its use, or a curve, [t + 1] loads by slots from
            `measured_loads` or elsewhere; curves need not be convex, nor falling.
        total: slots to share out.
        least: slots that every layer gets; AdapMoE's own code has 1.

    Raises:
        ValueError: `total` does not do for `least`; a curve that is empty, shorter than `least`,
            or not finite.

    Source: AdapMoE, as above; the dynamic program is `quernstone.allocate`.
    """
    total, least = whole("total", total), whole("least", least)
    curves = [_curve(f"layers[{i}]", layer, least) for i, layer in enumerate(layers)]
    if not curves:
        raise ValueError("layers: got none, expected one at least")
    if least * len(curves) > total:
        raise ValueError(f"total: got {total}, expected at least {least} for each layer")
    options = [
        [(slots, loss) for slots, loss in enumerate(curve) if slots >= least] for curve in curves
    ]
    found = allocate(options, total)
    return SlotPlan(tuple(least + i for i in found.choice), found.loss)


def _curve(name: str, layer: LayerUse | ArrayLike, least: int) -> list[float]:
    curve = expected_loads(layer) if isinstance(layer, LayerUse) else np.asarray(layer, np.float64)
    if curve.ndim != 1 or len(curve) <= least:
        raise ValueError(
            f"{name}.shape: got {curve.shape}, expected (slots + 1,) for {least} slots"
        )
    if not np.isfinite(curve).all():
        raise ValueError(f"{name}: got a number that is not finite, expected finite loads")
    return [float(x) for x in curve]
