"""Constants that are computed from constants, and scales and shifts that become part of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from quernstone.importers.graph import Array, Graph, Node, evaluate

# A constant of more elements than this is worth a node.
_MOST_FOLDED = 1 << 27
_TARGETS = ("conv", "conv_transpose", "linear")


def fold_constants(graph: Graph) -> Graph:
    """Nodes whose inputs are all constant become constants."""
    constants = dict(graph.constants)
    nodes = [node for node in graph.nodes if not fold_node(node, constants)]
    return replace(graph, nodes=tuple(nodes), constants=constants)


def fold_node(node: Node, constants: dict[str, Array]) -> bool:
    """Adds a node's outputs to the constants, where its inputs are all among them.

    Raises:
        ValueError: the result is huge, or the node cannot take these inputs.
    """
    names = [name for name in node.inputs if name]
    if not names or any(name not in constants for name in names):
        return False
    _refuse_huge(node, constants)
    given = [torch.from_numpy(constants[n].copy()) if n else None for n in node.inputs]
    for name, made in zip(node.outputs, evaluate(node, given), strict=False):
        constants[name] = made.numpy()
    return True


def _refuse_huge(node: Node, constants: Mapping[str, Array]) -> None:
    if node.op not in ("fill", "expand", "tile"):
        return
    shape = constants[node.inputs[-1]].astype(float)
    if node.op == "tile":
        shape = shape * constants[node.inputs[0]].size
    if not 0 <= np.abs(shape).prod() <= _MOST_FOLDED:
        raise ValueError(
            f"{node.op} {node.name!r}: a constant of shape {shape.astype(int).tolist()}, expected "
            f"{_MOST_FOLDED} elements or fewer"
        )


def fold_scales(graph: Graph, ranks: Mapping[str, int]) -> Graph:
    """Products and sums with constants per channel become part of the layer before them.

    y s + t of y = W x + b is (s W) x + (s b + t). The layer's result may have no other use.
    """
    while (folded := _fold_one(graph, ranks)) is not None:
        graph = folded
    return graph.without_dead_ends()


def _fold_one(graph: Graph, ranks: Mapping[str, int]) -> Graph | None:
    made = {out: node for node in graph.nodes for out in node.outputs}
    uses: dict[str, int] = dict.fromkeys(graph.outputs, 1)
    for node in graph.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    for node in graph.nodes:
        if node.op not in ("add", "sub", "mul", "div"):
            continue
        x, c = node.inputs
        if x in graph.constants and node.op in ("add", "mul"):
            x, c = c, x
        layer = made.get(x)
        if c not in graph.constants or layer is None or layer.op not in _TARGETS or uses[x] > 1:
            continue
        if layer.inputs[1] not in graph.constants or layer.input("bias") not in (
            None,
            *graph.constants,
        ):
            continue
        channel = _per_channel(graph, layer, graph.constants[c], ranks.get(x))
        if channel is not None:
            return _folded(graph, layer, node, channel, uses)
    return None


def _per_channel(graph: Graph, layer: Node, c: Array, rank: int | None) -> Array | None:
    """The constant as [out] numbers, where it is one number a channel and adds no axis."""
    weight = graph.constants[layer.inputs[1]]
    out = _channels(layer, weight)
    if layer.op != "linear":
        rank = weight.ndim
    if c.ndim > (2 if rank is None else rank):
        return None
    axis = -1 if layer.op == "linear" else 1 - weight.ndim
    if c.size == 1:
        return np.full(out, c.reshape(()), np.float64)
    if c.size != out or c.ndim < -axis or c.shape[axis] != out:
        return None
    return c.reshape(out).astype(np.float64)


def _channels(layer: Node, weight: Array) -> int:
    if layer.op == "conv_transpose":
        return int(weight.shape[1] * layer.attributes["groups"])
    return int(weight.shape[0])


def _folded(graph: Graph, layer: Node, node: Node, c: Array, uses: Mapping[str, int]) -> Graph:
    constants = dict(graph.constants)
    weight_name, bias_name = layer.inputs[1], layer.input("bias")
    weight = constants[weight_name]
    bias = np.zeros(len(c)) if bias_name is None else constants[bias_name].astype(np.float64)

    def put(name: str | None, role: str, array: Array) -> str:
        # A constant that another node uses too keeps its value there.
        if name is None or uses[name] > 1:
            name = f"{layer.name}.{role}"
            while name in constants:
                name += "_"
        constants[name] = array.astype(weight.dtype, order="C")
        return name

    if node.op in ("mul", "div"):
        c = c if node.op == "mul" else 1 / c
        bias = bias * c
        weight_name = put(weight_name, "weight", _scaled(layer, weight, c))
    else:
        bias = bias + (c if node.op == "add" else -c)
    inputs: tuple[str, ...] = (layer.inputs[0], weight_name)
    if bias_name is not None or node.op in ("add", "sub"):
        inputs += (put(bias_name, "bias", bias),)
    merged = replace(layer, inputs=inputs, outputs=node.outputs)
    nodes = [merged if n is layer else n for n in graph.nodes if n is not node]
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _scaled(layer: Node, weight: Array, c: Array) -> Array:
    wide = weight.astype(np.float64)
    if layer.op == "conv_transpose":
        # [c, out / groups, ...]: channel o of group g is row block g, column o.
        groups = layer.attributes["groups"]
        apart = wide.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        scale = c.reshape(groups, 1, weight.shape[1], *(1,) * (weight.ndim - 2))
        return (apart * scale).reshape(weight.shape)
    return wide * c.reshape(-1, *(1,) * (weight.ndim - 1))
