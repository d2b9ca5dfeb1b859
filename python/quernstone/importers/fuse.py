"""Activations, layer norm and attention that a file spells out become one node each.

A pattern is a tree: a tuple is a node (op, inputs...), with a dict of attributes at its end where
they matter; a string binds a tensor, one that begins with "=" a constant; a number is a constant of
one element. Inputs of commutative ops match in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quernstone.importers.folding import fold_scales
from quernstone.importers.graph import Array, Graph, Node

Bound = dict[str, str]
_COMMUTATIVE = ("add", "mul", "maximum", "minimum", "equal")
_CLOSE = 1e-5


@dataclass(frozen=True)
class Match:
    """Where a pattern matches: the root, its tensors by their names in the pattern, its nodes."""

    graph: Graph
    root: Node
    bound: Bound
    nodes: frozenset[str]

    def constant(self, name: str) -> Array:
        return self.graph.constants[self.bound[name]]

    def made(self, name: str) -> Node | None:
        return _producers(self.graph).get(self.bound[name])


Build = Callable[[Match], "list[Node] | None"]
"""The nodes that replace a match, the last with the root's outputs; None leaves it as it is."""


def fuse(graph: Graph, ranks: Mapping[str, int] | None = None) -> Graph:
    """Folds scales and shifts into layers, then replaces every pattern of `_RULES` by its node.

    Args:
        ranks: how many axes tensors have, of those for which it is known.
    """
    graph = fold_scales(_without_ones(graph), ranks or {})
    for pattern, build in _RULES:
        graph = _replace_all(graph, pattern, build)
    return graph.without_dead_ends()


def _without_ones(graph: Graph) -> Graph:
    """Products with the number 1 disappear."""
    alias: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        ones = [
            i
            for i, name in enumerate(inputs)
            if name in graph.constants and node.op == "mul" and _is(graph.constants[name], 1.0)
        ]
        if ones and node.outputs[0] not in graph.outputs:
            alias[node.outputs[0]] = inputs[1 - ones[0]]
        else:
            nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=tuple(nodes))


def _is(array: Array, number: float) -> bool:
    # A constant of more axes than one may add axes.
    return array.size == 1 and array.ndim <= 1 and bool(array.reshape(()) == number)


def _producers(graph: Graph) -> dict[str, Node]:
    return {out: node for node in graph.nodes for out in node.outputs}


def _replace_all(graph: Graph, pattern: Any, build: Build) -> Graph:
    producers = _producers(graph)
    users: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node.name)
    replaced: dict[str, list[Node]] = {}
    gone: set[str] = set()
    for root in graph.nodes:
        if root.op != pattern[0]:
            continue
        for bound, names in _match(pattern, root.outputs[0], {}, frozenset(), graph, producers):
            if names & gone or not _closed(graph, root, names, users):
                continue
            built = build(Match(graph, root, bound, names))
            if built is not None:
                replaced[root.name] = built
                gone |= names
                break
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in replaced:
            nodes += replaced[node.name]
        elif node.name not in gone:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _closed(
    graph: Graph, root: Node, names: frozenset[str], users: Mapping[str, list[str]]
) -> bool:
    """Nothing outside the match uses what its inner nodes make."""
    for name in names - {root.name}:
        for out in graph[name].outputs:
            if out in graph.outputs or not names.issuperset(users.get(out, [])):
                return False
    return True


def _match(
    pattern: Any,
    tensor: str,
    bound: Bound,
    names: frozenset[str],
    graph: Graph,
    producers: Mapping[str, Node],
) -> Iterator[tuple[Bound, frozenset[str]]]:
    if isinstance(pattern, str):
        if pattern.startswith("=") and tensor not in graph.constants:
            return
        if bound.get(pattern, tensor) == tensor:
            yield {**bound, pattern: tensor}, names
        return
    if isinstance(pattern, float):
        array = graph.constants.get(tensor)
        if array is not None and array.size == 1 and array.dtype.kind == "f":
            near = math.isclose(array.reshape(()), pattern, rel_tol=_CLOSE)
            yield from [(bound, names)] * near
        return
    node = producers.get(tensor)
    op, *children = pattern
    wanted = children.pop() if children and isinstance(children[-1], dict) else {}
    if node is None or node.op != op or len(node.inputs) != len(children):
        return
    if any(node.attributes.get(key) != value for key, value in wanted.items()):
        return
    orders = [node.inputs]
    if op in _COMMUTATIVE and node.inputs[0] != node.inputs[1]:
        orders.append(node.inputs[::-1])
    for order in orders:
        states = iter([(bound, names | {node.name})])
        for child, name in zip(children, order, strict=True):
            states = _extend(child, name, states, graph, producers)
        yield from states


def _extend(
    pattern: Any,
    tensor: str,
    states: Iterator[tuple[Bound, frozenset[str]]],
    graph: Graph,
    producers: Mapping[str, Node],
) -> Iterator[tuple[Bound, frozenset[str]]]:
    for bound, names in states:
        yield from _match(pattern, tensor, bound, names, graph, producers)


# Rules --------------------------------------------------------------------------------------------


def _one(op: str, **attributes: Any) -> Build:
    """A node of one input x."""

    def build(match: Match) -> list[Node]:
        return [replace(match.root, op=op, inputs=(match.bound["x"],), attributes=attributes)]

    return build


def _layer_norm(match: Match) -> list[Node] | None:
    weight, bias = match.constant("=weight"), match.constant("=bias")
    if weight.ndim != 1 or bias.shape != weight.shape or match.constant("=eps").size != 1:
        return None
    inputs = tuple(match.bound[name] for name in ("x", "=weight", "=bias"))
    eps = float(match.constant("=eps").reshape(()))
    return [replace(match.root, op="layer_norm", inputs=inputs, attributes={"eps": eps})]


def _attention(match: Match) -> list[Node] | None:
    """The keys come transposed; they are taken from before that."""
    turned = match.made("kt")
    if turned is None or turned.op != "transpose" or len(turned.attributes["axes"]) != 4:
        return None
    scale = 1.0
    for name, power in (("=scale", 1), ("=over", -1)):
        if name in match.bound:
            if match.constant(name).size != 1:
                return None
            scale *= float(match.constant(name).reshape(())) ** power
    axes = list(turned.attributes["axes"])
    axes[-2:] = axes[:-3:-1]
    keys, nodes = turned.inputs[0], []
    if axes != sorted(axes):
        keys = f"{match.root.outputs[0]}.keys"
        name = f"{match.root.name}.keys"
        nodes.append(Node(name, "transpose", turned.inputs, (keys,), {"axes": tuple(axes)}))
    inputs = [match.bound["q"], keys, match.bound["v"]]
    if "mask" in match.bound:
        inputs.append(match.bound["mask"])
    options = {"scale": scale}
    return [
        *nodes,
        replace(match.root, op="attention", inputs=tuple(inputs), attributes=options),
    ]


_CUBIC = [
    ("mul", "x", ("mul", "x", ("mul", 0.044715, "x"))),
    ("mul", 0.044715, ("mul", "x", ("mul", "x", "x"))),
    ("mul", 0.044715, ("pow", "x", 3.0)),
]
_TANH = [
    ("add", 1.0, ("tanh", ("mul", math.sqrt(2 / math.pi), ("add", "x", cubic)))) for cubic in _CUBIC
]
_ERF = [
    ("add", 1.0, ("erf", ("div", "x", math.sqrt(2)))),
    ("add", 1.0, ("erf", ("mul", "x", math.sqrt(0.5)))),
]
_CENTRED = ("sub", "x", ("mean", "x", {"axes": (-1,), "keep": True}))
_VARIANCE = [
    ("mean", ("pow", _CENTRED, 2.0), {"axes": (-1,), "keep": True}),
    ("mean", ("mul", _CENTRED, _CENTRED), {"axes": (-1,), "keep": True}),
]
_LOGITS = [
    ("matmul", ("mul", "q", "=scale"), "kt"),
    ("mul", ("matmul", "q", "kt"), "=scale"),
    ("div", ("matmul", "q", "kt"), "=over"),
    ("matmul", "q", "kt"),
]
_SIX = {"low": 0.0, "high": 6.0}

_RULES: list[tuple[Any, Build]] = [
    (("div", ("mul", "x", ("clip", ("add", "x", 3.0), _SIX)), 6.0), _one("hard_swish")),
    (("mul", "x", ("div", ("clip", ("add", "x", 3.0), _SIX), 6.0)), _one("hard_swish")),
    (("mul", "x", ("sigmoid", "x")), _one("silu")),
]
for _kind, _halves in ((False, _ERF), (True, _TANH)):
    for _half in _halves:
        _RULES += [
            (("mul", "x", ("mul", 0.5, _half)), _one("gelu", tanh=_kind)),
            (("mul", 0.5, ("mul", "x", _half)), _one("gelu", tanh=_kind)),
            (("mul", ("mul", "x", 0.5), _half), _one("gelu", tanh=_kind)),
        ]
for _variance in _VARIANCE:
    _normal = ("div", _CENTRED, ("sqrt", ("add", _variance, "=eps")))
    _RULES.append((("add", ("mul", _normal, "=weight"), "=bias"), _layer_norm))
for _logits in _LOGITS:
    for _masked in (("add", _logits, "mask"), _logits):
        _RULES.append((("matmul", ("softmax", _masked, {"axis": -1}), "v"), _attention))
