"""A trained network and inputs to one whose weights hold few ones, without training.

For every layer, several roundings are tried on some of its rows: shifts, coarser scales, prices of
a one. `quernstone.allocate` takes one for each layer so that ones are fewest within a budget of
fidelity, and the layers are rounded so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.allocate import allocate
from quernstone.importers import Graph, Node, evaluate
from quernstone.pim import checks, wds
from quernstone.pim.layers import Codes, Weight, nearest_codes, rows_of, weights_of
from quernstone.pim.macro import MAX_BITS
from quernstone.pim.rounding import ordered_factor, round_ordered

Inputs = Mapping[str, Tensor]
Fidelity = Literal["mean", "each", "noise"]

SHIFTS = (0, 8, 16, 24, 32, 48)
"""For weights of 8 bits; of b bits, 2^(b - 8) times these."""
STRETCHES = (1.0, 1.25, 1.5, 2.0)
PRICES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# Of prices: where shift and scale are chosen.
_PROBES = (2.0, 8.0)
# Rows of a layer that are tried, and columns of its inputs that are taken from one batch.
_ROWS, _COLUMNS = 64, 4096
# Odds of a row of zeros in a sample over those in the layer, from which on such rows are tried
# apart: errors are underrated by no more.
_MOST_ODDS = 3.0
# Ratios beyond are all the same.
_MOST_DECIBELS = 90.0
# What a layer above the mean can make up for others.
_SPARE_DECIBELS = 6.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of the inputs of each layer."""

    hessians: Mapping[str, Tensor]
    """[g, k, k]: the mean of x x^T, by the names of the weights."""
    power: Mapping[str, float]
    """The mean squared output of one column of inputs, summed over the outputs."""


def calibrate(graph: Graph, batches: Iterable[Inputs]) -> Calibration:
    """Runs a network and adds up what reaches its layers.

    Args:
        graph: of fixed weights.
        batches: inputs by name; a few hundred columns for each input of the widest layer do.

    Raises:
        ValueError: no batches, inputs that do not fit, numbers that are not finite in a layer.
    """
    weights = weights_of(graph)
    layers: dict[str, list[Weight]] = {}
    for weight in weights:
        layers.setdefault(weight.node.name, []).append(weight)
    sums: dict[str, Tensor] = {}
    power: dict[str, list[float]] = {weight.name: [0.0, 0.0] for weight in weights}
    columns: dict[str, int] = {}
    # Layers side by side share their inputs: query, key and value.
    shared = _sources(weights)

    def watch(node: Node, given: tuple[Tensor | None, ...]) -> list[Tensor] | None:
        if node.name not in layers:
            return None
        made = evaluate(node, given)
        for weight in layers[node.name]:
            x: Tensor | None = None
            if shared[weight.name] == weight.name:
                x = rows_of(weight, given, made, _COLUMNS).float()
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"{weight.name}: got inputs that are not finite")
                product = x @ x.transpose(1, 2)
                if weight.name in sums:
                    sums[weight.name] += product
                else:
                    sums[weight.name] = product
                columns[weight.name] = columns.get(weight.name, 0) + x.shape[-1]
            if node.op != "lstm":
                # Columns of inputs: outputs over channels, or inputs of a transposed convolution.
                seen = given[0] if node.op == "conv_transpose" else made[0]
                assert seen is not None
                power[weight.name][0] += float(made[0].double().square().sum())
                power[weight.name][1] += seen.numel() / weight.shape[0]
        return made

    batch = None
    with torch.no_grad():
        for batch in batches:
            graph.run(batch, hook=watch)
    if batch is None:
        raise ValueError("batches: got none, expected at least one")
    for weight in weights:
        name = shared[weight.name]
        if not columns.get(name, 0):
            raise ValueError(f"{weight.name}: got no inputs, expected at least one column")
        if not bool(torch.isfinite(sums[name]).all()):
            raise ValueError(f"{weight.name}: got inputs whose squares are beyond float32")
    means = {name: total / columns[name] for name, total in sums.items()}
    hessians = {weight.name: means[shared[weight.name]] for weight in weights}
    return Calibration(
        hessians, {w.name: _power(graph, w, power[w.name], hessians[w.name]) for w in weights}
    )


def _power(graph: Graph, weight: Weight, found: Sequence[float], hessian: Tensor) -> float:
    if found[1]:
        return found[0] / found[1]
    # Of an LSTM, what its gates get.
    w = weight.matrices(graph.constants[weight.constant]).double()
    return float(((w @ hessian.double()) * w).sum())


def _sources(weights: Sequence[Weight]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for weight in weights:
        node = weight.node
        what: tuple[object, ...] = (node.op, node.inputs[0])
        if node.op != "linear":
            what = (weight.name,)
        found[weight.name] = first.setdefault(what, weight.name)
    return found


class Layer(NamedTuple):
    """What became of one weight."""

    name: str
    op: str
    size: int
    hamming_rate_before: float
    """Of the nearest integers."""
    hamming_rate: float
    shift: int
    stretch: float
    """Its scales over those that cover every weight."""
    price: float
    """Of a one, over the mean squared error that one step of a weight makes."""
    snr: float
    """dB, of its output against that of the nearest integers, on the calibration inputs."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """A network in integers of few ones, beside the same one in the nearest integers."""

    graph: Graph
    """As it came."""
    nearest: Mapping[str, Codes]
    codes: Mapping[str, Codes]
    """By the names of the constants."""
    layers: tuple[Layer, ...]
    bits: int

    @property
    def int8(self) -> Graph:
        """The network that everything is compared with: every weight at its nearest integer."""
        return wds.with_codes(self.graph, self.nearest)

    @property
    def network(self) -> Graph:
        """With the numbers that the integers stand for as weights."""
        return wds.with_codes(self.graph, self.codes)

    def folded(self) -> Graph:
        """With stored integers as weights and the compensation as nodes, see `wds.fold`."""
        return wds.fold(self.graph, self.codes)

    @property
    def hamming_rate_before(self) -> float:
        return _rate(self.nearest.values())

    @property
    def hamming_rate(self) -> float:
        return _rate(self.codes.values())

    @property
    def cut(self) -> float:
        """The share of ones that is gone."""
        before = self.hamming_rate_before
        return 1.0 - self.hamming_rate / before if before else 0.0

    @property
    def snr(self) -> float:
        """dB, the mean of the layers'."""
        return float(np.mean([layer.snr for layer in self.layers]))


def _rate(codes: Iterable[Codes]) -> float:
    found = list(codes)
    return sum(c.ones for c in found) / sum(c.bits * c.stored.size for c in found)


class _Option(NamedTuple):
    stretch: float
    shift: int
    price: float
    ones: float
    noise: float
    """Mean squared, of one column of inputs, summed over the outputs."""


class Candidates:
    """The roundings of each layer that were tried, for any number of budgets.

    Args:
        graph: the network.
        calibration: of `calibrate`.
        bits: of a stored integer.
        shifts: to try; (0,) shifts nothing, `wds.powers_of_two()` those that need no multiplier.
        stretches: scales to try, over the least that clips nothing.
        prices: of a one to try, over the mean squared error of one step.
        rows: of each layer that are rounded for an estimate.

    Raises:
        ValueError: an argument out of its range, weights that are not finite, a layer that is not
            supported; messages name the layer.
    """

    def __init__(
        self,
        graph: Graph,
        calibration: Calibration,
        *,
        bits: int = 8,
        shifts: Sequence[int] | None = None,
        stretches: Sequence[float] = STRETCHES,
        prices: Sequence[float] = PRICES,
        rows: int = _ROWS,
    ) -> None:
        if checks.bits("bits", bits) < 2:
            raise ValueError(f"bits: got {bits}, expected 2 to {MAX_BITS}")
        if shifts is None:
            shifts = sorted({int(shift * 2.0 ** (bits - 8)) for shift in SHIFTS})
        for shift in shifts:
            if isinstance(shift, bool) or not hasattr(shift, "__index__"):
                raise TypeError(f"shifts: got {shift!r}, expected ints")
        low, high = checks.span(bits, signed=True)
        for name, values, least, most in (
            ("shifts", shifts, low, high),
            ("stretches", stretches, 1e-3, 1e3),
            ("prices", prices, 0.0, 1e6),
        ):
            if not len(values) or not all(least <= value <= most for value in values):
                raise ValueError(f"{name}: got {list(values)}, expected some, {least} to {most}")
        if rows < 1:
            raise ValueError(f"rows: got {rows}, expected 1 or more")
        self.graph, self.calibration, self.bits = graph, calibration, bits
        self._tried: list[tuple[Weight, Codes, list[_Option]]] = []
        pairs = [(stretch, shift) for stretch in stretches for shift in shifts]
        for problem in self._problems(rows):
            self._tried.append((problem.weight, problem.nearest, problem.options(pairs, prices)))

    def _problems(self, rows: int | None) -> Iterator[_Problem]:
        last: tuple[Tensor, Tensor] | None = None
        for weight in weights_of(self.graph):
            if weight.name not in self.calibration.hessians:
                raise ValueError(f"calibration: {weight.name!r} is missing")
            hessian = self.calibration.hessians[weight.name]
            if last is None or last[0] is not hessian:
                last = (hessian, ordered_factor(hessian))
            array = self.graph.constants[weight.constant]
            yield _Problem(
                weight, array, hessian, last[1], self.calibration.power[weight.name], self.bits,
                rows,
            )  # fmt: skip

    def choose(
        self,
        snr: float,
        *,
        fidelity: Fidelity = "noise",
        sensitivity: Mapping[str, float] | None = None,
    ) -> Compressed:
        """Rounds every layer so that ones are fewest at a fidelity.

        Args:
            snr: dB, of a layer's output against that with the nearest integers.
            fidelity: "noise": the relative squared errors of the layers, each times its
                sensitivity, come to no more than if every layer had `snr`; their mean ratio is then
                at least that. "each": every layer's ratio is, where some rounding reaches it.
                "mean": the mean over the layers is, each counting up to 6 dB above it. All by the
                estimate from the rows that were tried; the layers tell what became of all.
            sensitivity: by names of layers, for "noise"; 1 for those not named.

        Raises:
            ValueError: a ratio that is not finite or that no choice reaches, a sensitivity below 0
                or of no layer.
        """
        if not math.isfinite(snr):
            raise ValueError(f"snr: got {snr}, expected a finite number of dB")
        if fidelity not in ("mean", "each", "noise"):
            raise ValueError(f"fidelity: got {fidelity!r}, expected 'mean', 'each' or 'noise'")
        names = [weight.name for weight, _, _ in self._tried]
        weights = dict.fromkeys(names, 1.0)
        for name, value in (sensitivity or {}).items():
            if name not in weights or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"sensitivity: got {value} for {name!r}, expected layers' alone")
            weights[name] = value
        if sensitivity is not None and fidelity != "noise":
            raise ValueError(f"sensitivity: got some with fidelity {fidelity!r}, expected 'noise'")
        picked = self._pick(snr, fidelity, [weights[name] for name in names])
        layers, codes, nearest = [], {}, {}
        for problem, option in zip(self._problems(None), picked, strict=True):
            rounded = problem.round(option)
            noise = problem.noise(rounded)
            weight, before = problem.weight, problem.nearest
            found = problem.codes(rounded, option)
            codes[weight.constant], nearest[weight.constant] = found, before
            layers.append(
                Layer(
                    weight.name, weight.node.op, weight.size, before.hamming_rate,
                    found.hamming_rate, option.shift, option.stretch, option.price,
                    _decibels(noise, problem.power),
                )
            )  # fmt: skip
        return Compressed(self.graph, nearest, codes, tuple(layers), self.bits)

    def _pick(self, snr: float, fidelity: str, weights: Sequence[float]) -> list[_Option]:
        powers = [self.calibration.power[weight.name] for weight, _, _ in self._tried]
        groups = [options for _, _, options in self._tried]
        decibels = [
            [_decibels(option.noise, power) for option in options]
            for options, power in zip(groups, powers, strict=True)
        ]
        if fidelity == "each":
            picked = []
            for options, ratios in zip(groups, decibels, strict=True):
                enough = [o for o, ratio in zip(options, ratios, strict=True) if ratio >= snr]
                best = options[int(np.argmax(ratios))]
                picked.append(min(enough, key=lambda o: o.ones, default=best))
            return picked
        if fidelity == "mean":
            # In tenths of a dB below the most that counts: one layer that is left alone does not
            # make up for many that are ruined.
            most = snr + _SPARE_DECIBELS
            costs = [[round(10 * max(0.0, most - r)) for r in ratios] for ratios in decibels]
            budget = math.floor(10 * len(groups) * _SPARE_DECIBELS)
        else:
            # In shares of the budget small enough not to matter.
            limit = 10 ** (-snr / 10) * sum(weights)
            unit = limit / (1000 * len(groups))
            costs = [
                [math.ceil(min(w * 10 ** (-r / 10) / unit, 1e9)) if unit else 0 for r in ratios]
                for w, ratios in zip(weights, decibels, strict=True)
            ]
            budget = 1000 * len(groups)
        least = sum(map(min, costs))
        if least > budget:
            raise ValueError(
                f"snr: got {snr} dB, expected one that a rounding reaches, as all do at "
                f"{min(max(ratios) for ratios in decibels):.1f} dB"
            )
        choice = allocate(
            [
                [(cost, option.ones) for cost, option in zip(group, options, strict=True)]
                for group, options in zip(costs, groups, strict=True)
            ],
            budget,
        ).choice
        return [options[at] for options, at in zip(groups, choice, strict=True)]


def compress(
    graph: Graph,
    batches: Iterable[Inputs],
    *,
    snr: float = 30.0,
    fidelity: Fidelity = "noise",
    bits: int = 8,
    shifts: Sequence[int] | None = None,
) -> Compressed:
    """Quantises a network to integers of few ones, with calibration inputs alone.

    Weights are integers of `bits` bits with a scale for each output channel; activations stay as
    they are. Nothing is trained. What is kept is the network in its nearest integers.

    Args:
        graph: of `quernstone.importers`.
        batches: calibration inputs by name, see `calibrate`.
        snr: dB, what is kept of each layer's output, see `Candidates.choose`.
        fidelity: "noise", "each" or "mean", see there.
        bits: of a stored integer, 2 to 16.
        shifts: see `Candidates`.

    Returns:
        The network, before and after, with its layers' rates.

    Raises:
        ValueError: no batches, weights that are not finite, a layer that is not supported, a ratio
            that cannot be reached; messages name the layer.

    Source: our post-training form of AIM (arXiv 2511.04321): LHR and WDS. Oracles of its parts are
    named in `rounding` and `wds`.
    """
    candidates = Candidates(graph, calibrate(graph, batches), bits=bits, shifts=shifts)
    return candidates.choose(snr, fidelity=fidelity)


def integer_inputs(
    graph: Graph, batch: Inputs, weight: Weight, vectors: int, bits: int = 8
) -> NDArray[np.int16]:
    """What a layer multiplies, as signed integers with one scale.

    Args:
        batch: inputs of the network.
        weight: of a layer of it, without groups.
        vectors: how many of the layer's inputs; evenly spread over those of the batch.
        bits: of an integer, 2 to 16; the largest magnitude has the largest.

    Returns:
        [v, k], v at most `vectors`.

    Raises:
        ValueError: a weight of another network or with groups, a number out of range.
    """
    if weight.groups > 1:
        raise ValueError(f"weight: got {weight.name!r} of {weight.groups} groups, expected 1")
    if vectors < 1 or checks.bits("bits", bits) < 2:
        raise ValueError(f"vectors, bits: got {vectors}, {bits}, expected 1 and 2 at least")
    found: list[Tensor] = []

    def watch(node: Node, given: tuple[Tensor | None, ...]) -> list[Tensor] | None:
        if node.name != weight.node.name:
            return None
        made = evaluate(node, given)
        found.append(rows_of(weight, given, made)[0].T)
        return made

    with torch.no_grad():
        graph.run(batch, hook=watch)
    if not found:
        raise ValueError(f"weight: got {weight.name!r}, expected one of this graph's")
    rows = found[0]
    rows = rows[torch.arange(min(vectors, len(rows))) * len(rows) // min(vectors, len(rows))]
    most = (1 << (bits - 1)) - 1
    largest = float(rows.abs().max())
    return (rows * (most / largest if largest else 0.0)).round().numpy().astype(np.int16)


class _Part(NamedTuple):
    """Rows of a weight of which some are tried for all."""

    tried: Tensor
    """Those that are tried."""
    share: float
    """Of the rows."""
    heard: float
    """Of their errors."""


class _Problem:
    """One weight to round: all of it, or some rows of each group.

    It is rounded towards its nearest integers, which everything is compared with: without a price
    it stays what it is.
    """

    def __init__(
        self,
        weight: Weight,
        array: NDArray[Any],
        hessian: Tensor,
        upper: Tensor,
        power: float,
        bits: int,
        rows: int | None,
    ) -> None:
        self.weight, self.hessian, self.upper, self.power = weight, hessian, upper, power
        self.bits = bits
        self.nearest = nearest_codes(weight, array, bits)
        values = weight.matrices(self.nearest.values())
        scales = weight.per_row(torch.from_numpy(self.nearest.scale))
        steps = upper.diagonal(dim1=1, dim2=2).square().reciprocal().mean()
        self.unit = float(steps * scales.square().mean())
        few = None if rows is None else max(1, -(-rows // weight.groups))
        self._parts = _sampled((values == 0).all(dim=2), scales, few)
        self._sizes = [len(part.tried) for part in self._parts]
        index = torch.cat([part.tried for part in self._parts])
        self.matrices, self.scale = values.double()[:, index], scales[:, index]

    def round(self, option: _Option) -> Tensor:
        """Stored integers [g, n, k]."""
        return self._stored(option.stretch, option.shift, option.price)

    def _stored(self, stretch: float, shift: int, price: float) -> Tensor:
        self._stretch, self._shift = stretch, shift
        return round_ordered(
            self.matrices, self.hessian, self.upper, self.scale * stretch,
            price=price * self.unit, shift=shift, bits=self.bits,
        )  # fmt: skip

    def noise(self, stored: Tensor) -> float:
        """Of what was rounded last, against the nearest integers."""
        values = (stored.double() - self._shift) * (self.scale * self._stretch).unsqueeze(-1)
        off = values - self.matrices
        errors = ((off @ self.hessian.double()) * off).split(self._sizes, dim=1)
        return sum(
            float(those.sum().clamp(min=0)) / part.heard
            for those, part in zip(errors, self._parts, strict=True)
        )

    def ones(self, stored: Tensor) -> float:
        """Of all of the layer, from what was rounded."""
        mask = (1 << self.bits) - 1
        return sum(
            float(np.bitwise_count(those.numpy().astype(np.int32) & mask).sum(dtype=np.int64))
            / part.share
            for those, part in zip(stored.split(self._sizes, dim=1), self._parts, strict=True)
        )

    def codes(self, stored: Tensor, option: _Option) -> Codes:
        array = self.weight.array(stored).contiguous().numpy()
        scale = self.nearest.scale * option.stretch
        return Codes(self.weight, array, scale, option.shift, self.bits)

    def options(self, pairs: Sequence[tuple[float, int]], prices: Sequence[float]) -> list[_Option]:
        """Every price with the shifts and scales that are best at some price, and the nearest
        integers' own scale."""
        tried: dict[tuple[float, int, float], _Option] = {}

        def at(stretch: float, shift: int, price: float) -> _Option:
            key = (stretch, shift, price)
            if key not in tried:
                stored = self._stored(*key)
                tried[key] = _Option(*key, self.ones(stored), self.noise(stored))
            return tried[key]

        kept = {pairs[0]}
        for probe in _PROBES:
            price = probe * self.unit
            best = min(
                (at(stretch, shift, probe) for stretch, shift in pairs),
                key=lambda option: option.noise + price * option.ones,
            )
            kept.add((best.stretch, best.shift))
        for stretch, shift in sorted(kept):
            for price in prices:
                at(stretch, shift, price)
        return list(tried.values())


def _sampled(zero: Tensor, scales: Tensor, few: int | None) -> list[_Part]:
    """Some rows, evenly spread, of [g, n] with their steps, of which some are zeros."""

    def part(places: Tensor, steps: Tensor) -> _Part:
        n = len(places)
        size = n if few is None else min(n, few)
        index = places[torch.arange(size) * n // size]
        # Errors of a row are as large as its steps: a few rows may make most of a layer's.
        heard = steps[:, index].square().sum() / steps[:, places].square().sum()
        return _Part(index, size / n, float(heard))

    every = torch.arange(zero.shape[1])
    whole = part(every, scales)
    if _odds(zero[:, whole.tried]) <= _MOST_ODDS * _odds(zero):
        return [whole]
    # Rows of zeros have steps but no errors: too many of them hush the others.
    none = zero.all(dim=0)
    apart = [(every[~none], scales * ~zero), (every[none], scales)]
    return [part(places, steps) for places, steps in apart if len(places)]


def _odds(true: Tensor) -> float:
    share = float(true.double().mean())
    return share / (1 - share) if share < 1 else math.inf


def _decibels(noise: float, power: float) -> float:
    if power <= 0 or noise <= power * 10 ** (-_MOST_DECIBELS / 10):
        return _MOST_DECIBELS
    return 10 * math.log10(power / noise)
