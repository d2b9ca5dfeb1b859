"""Currents of macros from what switches in their adders, and whether toggle rates foretell drops.

A current that is computed from the toggle rate correlates with it by construction. Here it comes
from another model: every bit of every adder and accumulator, cycle by cycle, on a network's own
integers.

Axes: v vectors; t cycles; r, b tiles of a layer; s stages; m macros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone import _core
from quernstone.machine import Figure, Machine
from quernstone.pim import api, checks
from quernstone.pim.checks import Integers
from quernstone.pim.grid import Response
from quernstone.pim.macro import Macro
from quernstone.pim.work import Work

Floats = NDArray[np.float64]

_MODEL = "model, not silicon: "

SWITCHING = Machine(
    "equal-bits",
    {
        "switch.cell": Figure(
            1.0, "1", "assumed", _MODEL + "charge of a cell product that changes"
        ),
        "switch.adder": Figure(
            1.0, "1", "assumed", _MODEL + "of a bit of a sum, without glitches, as of a cell's"
        ),
        "switch.accumulator": Figure(
            2.0, "1", "assumed", _MODEL + "of a bit of the accumulator: adder and flip-flop"
        ),
    },
)
"""Relative charges of what switches."""


def adder_tree_toggles(weights: Integers, inputs: Integers, macro: Macro) -> NDArray[np.int64]:
    """Bits that change in the adder trees and accumulators of macros, in each cycle; exact.

    A bank adds its products p = bit and weight in a binary tree: level l holds sums of 2^l rows in
    weight_bits + l bits of two's complement. Its accumulator of weight_bits + ceil(log2 rows) +
    input_bits bits adds the root at the place of the cycle's bit, subtracts it for the sign, and
    begins anew with each vector. Bits are counted that differ between the ends of two cycles:
    glitches are not modelled.

    Args:
        weights: [o, i]
        inputs: [v, i]
        macro: with lines that count across vectors, without idle cycles and zero gating.

    Returns:
        [t, r, b, s]: stage 0 is the cell products, whose counts are those of `toggle_count`, stage
        l the sums of level l, and the last the accumulators. All are 0 before the first vector.

    Raises:
        ValueError: integers out of range, shapes that disagree, a macro that is driven otherwise.
        TypeError: no integers.

    Source: the model is ours. The oracle is `reference_tree`, in Python's own integers.
    """
    checks.is_macro(macro)
    if not macro.cross_vector or macro.zero_gating or macro.idle:
        raise ValueError(
            "macro: got lines that are gated, idle or apart for each vector, expected plain ones"
        )
    w = checks.weights(weights, macro)
    x = checks.inputs(inputs, macro, w.shape[1])
    shape = (
        len(x) * macro.input_bits,
        *macro.tiles(*w.shape),
        int(_core.pim.tree_stages(macro.rows)),
    )
    out = np.empty(shape, np.int64)
    _core.pim.tree_toggles(
        np.ascontiguousarray(w, np.int32),
        np.ascontiguousarray(x, np.int32),
        macro.rows,
        macro.banks,
        macro.weight_bits,
        macro.input_bits,
        macro.input_signed,
        macro.order == "msb",
        out,
    )
    return out


def charge(toggles: NDArray[np.int64], switching: Machine = SWITCHING) -> Floats:
    """Charges of `adder_tree_toggles`, [..., s] to [...], in the units of a cell's."""
    cell, adder, accumulator = (
        switching.value(f"switch.{name}", "1") for name in ("cell", "adder", "accumulator")
    )
    scale = np.full(toggles.shape[-1], adder)
    scale[0], scale[-1] = cell, accumulator
    return np.asarray(toggles @ scale)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """The linear correlation of two samples; NaN where one of them does not vary."""
    a, b = (np.asarray(z, np.float64).ravel() for z in (x, y))
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"x, y: got {len(a)} and {len(b)} numbers, expected as many, two at least")
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0.0 else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """The correlation of the ranks, of equals the mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: ArrayLike) -> Floats:
    _, inverse, counts = np.unique(np.ravel(x), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse.ravel()], np.float64)


@dataclass(frozen=True, eq=False)
class Load:
    """What the macros of a chip do in one round, and what it makes of the grid.

    Axes: t cycles; m macros that hold a part of a layer.
    """

    names: tuple[str, ...]
    hamming: Floats
    """[m] HR; cells that the layer does not fill count as zeros"""
    rtog: Floats
    """[t, m]"""
    current: Floats
    """[t, m] ampere, of the adder trees and accumulators"""
    drop: Floats
    """[t, m] worst within each macro, volts"""


@dataclass(frozen=True)
class Correlation:
    """How well a rate foretells a drop: Pearson's coefficient and Spearman's."""

    pearson: float
    spearman: float
    samples: int

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike) -> Correlation:
        """Of two samples."""
        return cls(pearson(x, y), spearman(x, y), int(np.size(x)))

    def __str__(self) -> str:
        return f"r {self.pearson:+.3f}, rho {self.spearman:+.3f} ({self.samples})"


@dataclass(frozen=True)
class Claim:
    """AIM's central claim on one network: rates of toggles and of ones foretell the drop."""

    rtog_current: Correlation
    """Rtog of a macro and its independent current, each cycle: the two models, without a grid."""
    rtog_drop: Correlation
    """Rtog of a macro and the worst drop in it, each cycle."""
    hamming_worst: Correlation
    """HR of a macro and the worst drop in it over all cycles."""
    hamming_mean: Correlation
    """HR of a macro and its mean drop."""
    hamming_bound: float
    """The share of macros and cycles whose Rtog is at most HR; 1 by the identity."""


def loads(
    layers: Sequence[Work],
    macro: Macro,
    response: Response,
    chip: Machine,
    *,
    vectors: int = 32,
    switching: Machine = SWITCHING,
) -> list[Load]:
    """Runs layers on a chip, as many macros at a time as it has, and solves the grid each cycle.

    A macro draws `macro.static_share` of `macro.power` always. The rest goes with the charge that
    its adders move; its scale is that of a chip whose mean current is the one that the toggle rate
    would give, `macro.power` times Rtog, so that drops are of a size. Correlations do not depend on
    either scale.

    Args:
        layers: of a network, with weights that are known beforehand or not.
        macro: that they are tiled over.
        response: of the chip's grid.
        chip: figures "macro.power", "macro.static_share" and "supply.voltage".
        vectors: most consecutive vectors of a layer that run.
        switching: figures of `SWITCHING`.

    Returns:
        A load for each round, in which tiles stand in the order of the layers. Macros of a round
        run as long as the shortest of them.

    Raises:
        ValueError: no layers; integers that the macro does not hold.
    """
    if not layers:
        raise ValueError("layers: got none, expected one at least")
    macros = len(response.matrix)
    tiles: list[tuple[str, float, Floats, Floats]] = []
    for work in layers:
        counts = adder_tree_toggles(work.weights, work.inputs[:vectors], macro)
        rates = api.hamming_rate(work.weights, macro.weight_bits, per="macro", macro=macro)
        moved = charge(counts, switching)
        for r, b in np.ndindex(counts.shape[1:3]):
            name = f"{work.name}[{r},{b}]"
            rtog = counts[:, r, b, 0] / macro.cells
            tiles.append((name, float(rates[r, b]), rtog, moved[:, r, b]))
    # A cell's worth of charge, such that both models have the same mean over the network.
    scale = sum(float(t[2].mean()) for t in tiles) / sum(float(t[3].mean()) for t in tiles)
    full = chip.value("macro.power", "W") / chip.value("supply.voltage", "V")
    static = chip.value("macro.static_share", "1")
    found = []
    for begin in range(0, len(tiles), macros):
        part = tiles[begin : begin + macros]
        cycles = min(len(t[2]) for t in part)
        rtog = np.stack([t[2][:cycles] for t in part], axis=1)
        moved = np.stack([t[3][:cycles] for t in part], axis=1)
        current = full * (static + (1.0 - static) * scale * moved)
        drawn = np.full((cycles, macros), full * static)
        drawn[:, : len(part)] = current
        drop = response.worst(drawn)[:, : len(part)]
        names = tuple(t[0] for t in part)
        found.append(Load(names, np.array([t[1] for t in part]), rtog, current, drop))
    return found


def claim(rounds: Sequence[Load]) -> Claim:
    """The correlations over all rounds of a network.

    Raises:
        ValueError: no rounds.
    """
    if not rounds:
        raise ValueError("rounds: got none, expected one at least")

    def every(name: str) -> Floats:
        return np.concatenate([getattr(one, name).ravel() for one in rounds])

    hamming = every("hamming")
    worst = np.concatenate([one.drop.max(axis=0) for one in rounds])
    mean = np.concatenate([one.drop.mean(axis=0) for one in rounds])
    rtog = every("rtog")
    bound = np.concatenate([(one.rtog <= one.hamming + 1e-15).ravel() for one in rounds])
    return Claim(
        Correlation.of(rtog, every("current")),
        Correlation.of(rtog, every("drop")),
        Correlation.of(hamming, worst),
        Correlation.of(hamming, mean),
        float(bound.mean()),
    )
