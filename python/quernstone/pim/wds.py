"""Weight shift (WDS): small negative weights cost many ones in two's complement, positive ones few.

A layer stores w + shift for each integer weight w, and what that adds to its output is taken away
again: the shift times the sum of the inputs that an output sees, which all outputs share.

    y = sum_i x_i w_i = sum_i x_i (w_i + shift) - shift sum_i x_i

exactly, unless w + shift leaves the bits and is cut.

Source: AIM (arXiv 2511.04321) and the authors' code; our reading of the paper's power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quernstone.allocate import allocate
from quernstone.importers import Graph, Node
from quernstone.pim import checks
from quernstone.pim.layers import Codes, Weight

ANY_SHIFT = tuple(range(65))
"""For weights of 8 bits."""


def powers_of_two(bits: int = 8) -> tuple[int, ...]:
    """0 and the powers of two up to a quarter of the codes: compensation is a shift of bits."""
    return (0, *(1 << i for i in range(checks.bits("bits", bits) - 1)))


def shifted(codes: Codes, shift: int) -> Codes:
    """The same weight with another shift; what leaves the bits is cut and counted.

    Raises:
        ValueError: a shift as large as the codes themselves.
    """
    _check_shift(shift, codes.bits)
    low, high = checks.span(codes.bits, signed=True)
    wanted = codes.stored.astype(np.int64) - codes.shift + shift
    stored = np.clip(wanted, low, high)
    clipped = int((stored != wanted).sum())
    return replace(codes, stored=stored.astype(np.int16), shift=shift, clipped=clipped)


def _check_shift(shift: int, bits: int) -> None:
    low, high = checks.span(bits, signed=True)
    if not low <= shift <= high:
        raise ValueError(f"shift: got {shift}, expected {low} to {high} ({bits} bits)")


def search_shifts(
    layers: Sequence[Codes],
    shifts: Sequence[int] = ANY_SHIFT,
    *,
    clipped: float = 0.0,
) -> list[Codes]:
    """Each layer with the shift that leaves the fewest ones in all of them together.

    Args:
        layers: integers of the layers' weights, not shifted yet.
        shifts: to choose from; `powers_of_two()` for compensation without multiplying.
        clipped: share of all weights that may be cut; 0 keeps every product exact.

    Returns:
        The layers, in their order.

    Raises:
        ValueError: no layers or shifts, a share out of 0 to 1, or more weights cut than that
            whatever the shifts.

    Source: `quernstone.allocate`: cost is weights cut, loss is ones. Oracle: all choices.
    """
    if not layers or not shifts:
        raise ValueError(f"layers, shifts: got {len(layers)} and {len(shifts)}, expected some")
    for shift in shifts:
        _check_shift(shift, min(layer.bits for layer in layers))
    if not 0.0 <= clipped <= 1.0:
        raise ValueError(f"clipped: got {clipped}, expected 0 to 1")
    options = [
        [_outcome(layer, counts, shift) for shift in shifts]
        for layer, counts in ((layer, _histogram(layer)) for layer in layers)
    ]
    budget = math.floor(clipped * sum(layer.stored.size for layer in layers))
    choice = allocate(options, budget).choice
    return [shifted(layer, shifts[at]) for layer, at in zip(layers, choice, strict=True)]


def _histogram(codes: Codes) -> NDArray[np.int64]:
    low, _ = checks.span(codes.bits, signed=True)
    return np.bincount(codes.stored.ravel().astype(np.int64) - low, minlength=1 << codes.bits)


def _outcome(codes: Codes, counts: NDArray[np.int64], shift: int) -> tuple[int, int]:
    """What `shifted` would cut, and the ones that it would leave, from how often integers occur."""
    low, high = checks.span(codes.bits, signed=True)
    wanted = np.arange(low, high + 1) - codes.shift + shift
    stored = np.clip(wanted, low, high)
    ones = np.bitwise_count(stored & ((1 << codes.bits) - 1))
    return int(counts[stored != wanted].sum()), int((counts * ones).sum())


def integer_output(codes: Codes, x: Tensor, *, zero_point: int = 0) -> Tensor:
    """What a macro and its compensation give for integer inputs: a plain twin, in int64.

    Args:
        codes: of a conv, conv_transpose, linear, or the input weight of an lstm.
        x: integers as stored, in the layout of the node's input; padding holds the zero point.
        zero_point: the integer that stands for the activation 0.

    Returns:
        sum (x - zero_point) (stored - shift), int64: the products of the stored integers, minus
        the shift times the sum of inputs. Exactly the product with the weight before the shift
        unless some were cut.

    Raises:
        ValueError: codes of another op.
    """
    centred = x.long() - zero_point
    stored = torch.from_numpy(codes.stored).long()
    weight = codes.weight
    main = _product(weight, centred, stored)
    if not codes.shift:
        return main
    return main - codes.shift * _product(weight, centred, _ones_like(weight, stored))


def _product(weight: Weight, x: Tensor, w: Tensor) -> Tensor:
    node, attributes = weight.node, weight.node.attributes
    if node.op == "linear" or (node.op == "lstm" and weight.role == "weight"):
        return x @ w.T
    if node.op == "conv":
        padding = [side for sides in reversed(attributes["padding"]) for side in sides]
        x = functional.pad(x, padding)
        run: Any = (functional.conv1d, functional.conv2d)[len(attributes["stride"]) - 1]
        groups = attributes.get("groups", 1)
        made = run(x, w, None, attributes["stride"], 0, attributes["dilation"], groups)
        return cast(Tensor, made)
    raise ValueError(f"codes: got {weight.name!r}, a {node.op}, expected a linear or conv")


def _ones_like(weight: Weight, stored: Tensor) -> Tensor:
    """Weights whose product is the sum of the inputs of each output: one output does for all of a
    layer without groups."""
    if weight.groups > 1:
        return torch.ones_like(stored)
    axis = 1 if weight.node.op == "conv_transpose" else 0
    return torch.ones_like(stored.narrow(axis, 0, 1))


def with_codes(graph: Graph, codes: Mapping[str, Codes]) -> Graph:
    """The graph with the numbers that integers stand for in the place of weights.

    A weight that an embedding looks up too keeps its numbers there.

    Args:
        codes: by the names of the constants.
    """
    elsewhere = {
        name
        for node in graph.nodes
        for name in node.inputs
        if name in codes and node.op != codes[name].weight.node.op
    }
    renamed = {name: f"{name}.product" if name in elsewhere else name for name in codes}
    constants = dict(graph.constants)
    constants |= {renamed[name]: c.values() for name, c in codes.items()}
    nodes = tuple(
        replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if any(name in elsewhere and node.op == codes[name].weight.node.op for name in node.inputs)
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes, constants=constants)


def fold(graph: Graph, codes: Mapping[str, Codes]) -> Graph:
    """The graph as macros run it: stored integers as weights, compensation and scale as nodes.

        y = scale (conv(x, stored) - conv(x, shift of every weight)) + bias

    With integer inputs whose sums stay below 2^24 both convolutions are exact in fp32, and the
    outputs equal, to the last bit, those of the same graph without shifts. Padding is compensated
    by being padding of both. `Graph.save` and `write_onnx` write it.

    LSTMs keep one node, which has no place for the compensation of its recurrent sum: their weights
    are the numbers that the integers stand for.

    Args:
        codes: by the names of the constants.
    """
    inside = {name: c for name, c in codes.items() if c.weight.node.op == "lstm"}
    outside = {name: c for name, c in codes.items() if name not in inside}
    graph = with_codes(graph, inside)
    constants = dict(graph.constants)
    nodes: list[Node] = []
    for node in graph.nodes:
        found = outside.get(node.input("weight") or "")
        if found is None or node.op != found.weight.node.op:
            nodes.append(node)
            continue
        nodes += _folded(node, found, constants)
    return replace(graph, nodes=tuple(nodes), constants=constants).without_dead_ends()


def _folded(node: Node, codes: Codes, constants: dict[str, Any]) -> list[Node]:
    weight = replace(codes.weight, node=node)
    # For outputs [b, c, ...] of convolutions, [..., c] of linear layers.
    beside = (-1, *(1 for _ in weight.shape[2:]))
    stored = torch.from_numpy(codes.stored).float()
    x, out = node.inputs[0], node.outputs[0]
    nodes: list[Node] = []

    def emit(op: str, what: str, inputs: tuple[str, ...], last: bool = False) -> str:
        name = f"{node.name}.{what}"
        attributes = node.attributes if op == node.op else {}
        made = out if last else name
        nodes.append(Node(name, op, inputs, (made,), attributes))
        return made

    def constant(what: str, array: Any) -> str:
        name = f"{node.name}.{what}"
        constants[name] = np.asarray(array, np.float32)
        return name

    now = emit(node.op, "macro", (x, constant("stored", stored.numpy())))
    if codes.shift:
        ones = codes.shift * _ones_like(weight, stored)
        same = emit(node.op, "inputs", (x, constant("shift", ones.numpy())))
        now = emit("sub", "compensated", (now, same))
    bias = node.input("bias")
    scale = constant("scale", codes.scale.reshape(beside))
    now = emit("mul", "scaled", (now, scale), last=bias is None)
    if bias is not None:
        emit(
            "add",
            "biased",
            (now, constant("offset", constants[bias].reshape(beside))),
            last=True,
        )
    return nodes
