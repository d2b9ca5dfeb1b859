"""What a network asks of macros: the integers that they hold and those that stream through them.

Axes: o outputs, i inputs of a layer; v vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.importers import Graph, Node, evaluate
from quernstone.pim.layers import windows_of

MOST_VECTORS = 128
"""Of a layer that are looked at, unless more are asked for."""


@dataclass(frozen=True, eq=False)
class Work:
    """A matrix that macros hold and the vectors that stream through it.

    Args:
        name: of the layer.
        weights: [o, i] integers.
        inputs: [v, i] integers, consecutive vectors.
        vectors: how many vectors the layer really has; `inputs` are v of them.
        known: whether the weights are known before the network runs. Those of attention, which are
            activations, are not: they have no Hamming rate to plan with.
    """

    name: str
    weights: NDArray[Any]
    inputs: NDArray[Any]
    vectors: int
    known: bool = True

    def __post_init__(self) -> None:
        for name in ("weights", "inputs"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
                got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"{name}: got {got}, expected an array of integers")
            if array.ndim != 2 or not array.size:
                raise ValueError(f"{name}.shape: got {array.shape}, expected two axes, none empty")
        if self.weights.shape[1] != self.inputs.shape[1]:
            raise ValueError(
                f"inputs.shape[1]: got {self.inputs.shape[1]}, expected {self.weights.shape[1]}, "
                "the inputs of the weights"
            )
        if self.vectors < len(self.inputs):
            raise ValueError(
                f"vectors: got {self.vectors}, expected at least {len(self.inputs)}, those given"
            )

    @property
    def products(self) -> int:
        """Of a weight by an input, in the whole layer."""
        return self.weights.size * self.vectors


@dataclass(frozen=True, eq=False)
class NetworkWork:
    """All that a network asks of macros, and what it does elsewhere."""

    layers: tuple[Work, ...]
    elsewhere: Mapping[str, int]
    """Products by the name of a layer that macros do not take: grouped convolutions, whose rows
    no two banks share, and recurrent layers."""

    @property
    def share(self) -> float:
        """Of all products, those in macros."""
        inside = sum(work.products for work in self.layers)
        return inside / (inside + sum(self.elsewhere.values())) if inside else 0.0


def quantised_inputs(
    x: Tensor, bits: int = 8, *, low: float | None = None, high: float | None = None
) -> NDArray[np.uint8]:
    """Unsigned codes of activations, asymmetric with one scale: round((x - low) / scale).

    Args:
        x: floating point, any shape.
        bits: 1 to 8.
        low, high: the range; None is that of x, widened to hold 0.
    """
    least = float(x.amin()) if low is None else low
    most = float(x.amax()) if high is None else high
    least, most = min(least, 0.0), max(most, 0.0)
    scale = (most - least) / ((1 << bits) - 1) or 1.0
    zero = round(-least / scale)
    codes = torch.round(x / scale).add_(zero).clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8).numpy()


def network_work(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, NDArray[Any]],
    *,
    input_bits: int = 8,
    vectors: int = MOST_VECTORS,
    attention: bool = True,
) -> NetworkWork:
    """Runs a network once and records what its layers would stream through macros.

    Args:
        graph: of the network; it runs as it is.
        inputs: one input of it, by name.
        weights: by the name of a conv or linear layer its integers, in the shape of its weight.
            Layers that are not named are left out.
        input_bits: of the activations' codes, 1 to 8.
        vectors: most consecutive vectors of a layer that are kept, from its middle.
        attention: whether the two products of attention run in macros too, a head each.

    Raises:
        ValueError: weights of an unknown layer or another shape, inputs that the graph does not
            take, `vectors` or `input_bits` out of range.
    """
    if not 1 <= input_bits <= 8:
        raise ValueError(f"input_bits: got {input_bits}, expected 1 to 8")
    if vectors < 1:
        raise ValueError(f"vectors: got {vectors}, expected 1 or more")
    known = {node.name: node for node in graph.layers()}
    for name, codes in weights.items():
        if name not in known:
            raise ValueError(f"weights: got {name!r}, expected a layer of the graph")
        want = graph.weight(name).shape
        if codes.shape != want:
            raise ValueError(f"weights[{name!r}].shape: got {codes.shape}, expected {want}")
    found: list[Work] = []
    elsewhere: dict[str, int] = {}

    def record(node: Node, given: tuple[Tensor | None, ...]) -> list[Tensor]:
        made = evaluate(node, given)
        if node.name in weights:
            whole = weights[node.name]
            taken = _LAYERS.get(node.op)
            grouped = node.attributes.get("groups", 1) != 1
            if taken is None or grouped or whole.ndim > 4:
                elsewhere[node.name] = _products(node, whole, given, made[0])
            else:
                x = given[0]
                assert x is not None
                rows, count = taken(node, x, whole.shape[2:], vectors)
                codes = whole.reshape(len(whole), -1)
                if not x.numel() or not bool(torch.isfinite(x).all()):
                    got = "a number that is not finite" if x.numel() else "no inputs"
                    raise ValueError(f"{node.name}: got {got}, expected finite numbers")
                low, high = float(x.amin()), float(x.amax())
                codes_in = quantised_inputs(rows, input_bits, low=low, high=high)
                found.append(Work(node.name, codes, codes_in, count))
        elif attention and node.op == "attention":
            found.extend(_attention(node, given, made[0], input_bits, vectors))
        return made

    with torch.no_grad():
        graph.run(inputs, hook=record)
    return NetworkWork(tuple(found), elsewhere)


def _products(node: Node, weight: NDArray[Any], given: Sequence[Tensor | None], out: Tensor) -> int:
    x = given[0]
    assert x is not None
    if node.op == "conv_transpose":
        return int(weight[0].size) * x.numel()
    if node.op == "lstm":
        return int(weight.size) * x.numel() // x.shape[-1]
    return int(weight[0].size) * out.numel()


def _middle(x: Tensor, vectors: int) -> Tensor:
    begin = max(0, (len(x) - vectors) // 2)
    return x[begin : begin + vectors]


def _linear(_node: Node, x: Tensor, _window: Sequence[int], vectors: int) -> tuple[Tensor, int]:
    rows = x.reshape(-1, x.shape[-1])
    return _middle(rows, vectors), len(rows)


def _conv(node: Node, x: Tensor, window: Sequence[int], vectors: int) -> tuple[Tensor, int]:
    """The windows of a convolution in one or two dimensions, [v, channels x window]."""
    seen = windows_of(node, x, window).permute(0, 2, 3, 1, 4, 5)
    total = math.prod(seen.shape[:3])
    chosen = _middle(torch.arange(total), vectors)
    return seen[torch.unravel_index(chosen, seen.shape[:3])].reshape(len(chosen), -1), total


def _attention(
    node: Node,
    given: Sequence[Tensor | None],
    out: Tensor,
    bits: int,
    vectors: int,
) -> Iterable[Work]:
    """q k^T and probabilities times v, of each head: the macros hold k and the transpose of v."""
    q, k, v = given[:3]
    mask = given[3] if len(given) > 3 else None
    assert q is not None
    assert k is not None
    assert v is not None
    logits = node.attributes["scale"] * (q @ k.transpose(-1, -2))
    if mask is not None:
        logits = logits + mask
    if node.attributes.get("causal", False):
        t, s = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(t, s).triu(s - t + 1).bool(), -torch.inf)
    shares = torch.softmax(logits, -1)
    signed = 1 << (bits - 1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for what, held, stream in (
                ("qk", k[b, h], q[b, h]),
                ("av", v[b, h].transpose(0, 1), shares[b, h]),
            ):
                scale = float(held.abs().amax()) / (signed - 1) or 1.0
                codes = torch.round(held / scale).to(torch.int8).numpy()
                rows = _middle(stream, vectors)
                low, high = float(stream.amin()), float(stream.amax())
                yield Work(
                    f"{node.name}.{what}.{b}.{h}",
                    codes,
                    quantised_inputs(rows, bits, low=low, high=high),
                    len(stream),
                    known=False,
                )


_LAYERS: Mapping[str, Callable[[Node, Tensor, Sequence[int], int], tuple[Tensor, int]]] = {
    "linear": _linear,
    "conv": _conv,
}
