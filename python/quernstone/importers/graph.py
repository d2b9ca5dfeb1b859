"""A small layer graph: named tensors, nodes in topological order, constants as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.importers import ops

if TYPE_CHECKING:
    from quernstone.importers.module import GraphModule

Array = NDArray[Any]

_LAYERS = ("conv", "conv_transpose", "linear", "lstm", "embedding")
# What is computed from shapes is a handful of numbers; tables of them are left to be computed.
_MOST_FOLDED = 1 << 16


class Value(NamedTuple):
    """An input of a graph."""

    name: str
    dtype: str
    """As torch names it: "float32", "int64", ..."""
    shape: tuple[int | None, ...] | None
    """None for an extent that is free, or for a rank that is."""


@dataclass(frozen=True)
class Node:
    """One operation."""

    name: str
    op: str
    """A name of `ops.OPS`, where the signature holds the roles of inputs and the attributes."""
    inputs: tuple[str, ...]
    """Names of tensors; "" where an optional one is absent."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def input(self, role: str) -> str | None:
        """The tensor that plays a role ("x", "weight", "bias", ...); None where it is absent."""
        roles = ops.schema(self.op).roles
        if role not in roles or roles.index(role) >= len(self.inputs):
            return None
        return self.inputs[roles.index(role)] or None


Hook = Callable[[Node, "tuple[Tensor | None, ...]"], "Tensor | Sequence[Tensor] | None"]
"""hook(node, inputs): called before a node runs; what it returns stands for the node's outputs,
None lets the node run."""


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A network that has been read.

    Nothing in it changes: a vertical makes a new graph, by `with_constants` or from other nodes.

    Raises:
        ValueError: a name that stands twice or is not there, an op that does not exist, inputs or
            attributes that the op does not have, nodes in a circle, weights whose shapes disagree.
    """

    nodes: tuple[Node, ...]
    """In topological order, whatever order they came in."""
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]
    """Weights, and the few other tensors that do not depend on the inputs. Not to be written to."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What else the file says."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of all tensors, in a graph that `specialised` made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _in_order(self))
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))
        for node in self.nodes:
            _check_node(node, self.constants)

    def __repr__(self) -> str:
        numbers = sum(array.size for array in self.constants.values())
        given = ", ".join(value.name for value in self.inputs)
        made = ", ".join(self.outputs)
        return f"<Graph {given} -> {made}: {len(self.nodes)} nodes, {numbers:,} constant numbers>"

    def __getitem__(self, name: str) -> Node:
        """The node of this name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def layers(self) -> list[Node]:
        """The nodes that multiply by a constant weight: conv, linear, embedding, lstm, ..."""
        return [
            node
            for node in self.nodes
            if node.op in _LAYERS and node.input("weight") in self.constants
        ]

    def weight(self, layer: str | Node, role: str = "weight") -> Array:
        """The constant that plays a role in a layer, such as "weight", "bias" or "recurrent"."""
        node = self[layer] if isinstance(layer, str) else layer
        name = node.input(role)
        if name is None or name not in self.constants:
            raise ValueError(f"{node.op} {node.name!r} has no constant {role}")
        return self.constants[name]

    def with_constants(self, constants: Mapping[str, Array]) -> Graph:
        """The same graph with some constants replaced.

        Args:
            constants: arrays by the names of what they replace, of the same shapes.

        Raises:
            ValueError: an unknown name, another shape, a number that is not finite.
        """
        for name, array in constants.items():
            if name not in self.constants:
                raise ValueError(f"constants: {name!r} is none of this graph's")
            got, want = np.shape(array), self.constants[name].shape
            if got != want:
                raise ValueError(f"constants[{name!r}]: got shape {got}, expected {want}")
            check_finite(f"constants[{name!r}]", array)
        changed = {
            name: np.array(array, self.constants[name].dtype, order="C")
            for name, array in constants.items()
        }
        return replace(self, constants={**self.constants, **changed})

    def run(
        self,
        inputs: Mapping[str, Tensor | Array],
        *,
        constants: Mapping[str, Tensor] | None = None,
        hook: Hook | None = None,
        outputs: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluates the graph in torch, on the CPU.

        Args:
            inputs: a tensor for each of `self.inputs`.
            constants: tensors that stand for constants in this run; they may require gradients.
            hook: see `Hook`; observes the inputs of nodes, or computes their outputs otherwise.
            outputs: names of any tensors; None is `self.outputs`.

        Returns:
            The outputs by name.

        Raises:
            ValueError: inputs that are missing, superfluous, of another dtype or shape; a node that
                cannot take the shapes that reach it, by its op and name.
        """
        wanted = self.outputs if outputs is None else tuple(outputs)
        there: dict[str, Tensor] = {name: _tensor(a) for name, a in self.constants.items()}
        there |= constants or {}
        there |= _checked_inputs(self.inputs, inputs)
        uses = _uses(self.nodes)
        for name in wanted:
            uses[name] = uses.get(name, 0) + 1
        for node in self.nodes:
            given = tuple(there[name] if name else None for name in node.inputs)
            for name, tensor in zip(node.outputs, _run_node(node, given, hook), strict=False):
                there[name] = tensor
            for name in node.inputs:
                if name:
                    uses[name] -= 1
                    if not uses[name]:
                        del there[name]
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ValueError(f"outputs: got {missing[0]!r}, expected a tensor of this graph")
        return {name: there[name] for name in wanted}

    def specialised(self, shapes: Mapping[str, Sequence[int]]) -> Graph:
        """The graph for fixed shapes of the inputs: no node computes with shapes any more.

        Args:
            shapes: for each input its shape.

        Returns:
            A graph whose `shapes` are those of all tensors.
        """
        zeros = {
            value.name: torch.zeros(tuple(shapes[value.name]), dtype=getattr(torch, value.dtype))
            for value in self.inputs
            if value.name in shapes
        }
        found = {name: tuple(array.shape) for name, array in self.constants.items()}
        found |= {name: tuple(tensor.shape) for name, tensor in zeros.items()}
        constants = dict(self.constants)

        def record(node: Node, given: tuple[Tensor | None, ...]) -> list[Tensor]:
            known = all(name in constants for name in node.inputs if name)
            made = ops.evaluate(node.op, given, node.attributes)
            for name, tensor in zip(node.outputs, made, strict=False):
                found[name] = tuple(tensor.shape)
                if (known or node.op == "shape") and tensor.numel() <= _MOST_FOLDED:
                    constants[name] = tensor.numpy()
            return made

        with torch.no_grad():
            self.run(zeros, hook=record)
        nodes = tuple(n for n in self.nodes if not all(out in constants for out in n.outputs))
        values = tuple(v._replace(shape=tuple(shapes[v.name])) for v in self.inputs)
        return replace(
            self, nodes=nodes, inputs=values, constants=constants, shapes=found
        ).without_dead_ends()

    def without_dead_ends(self) -> Graph:
        """The graph without nodes and constants that no output needs."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        constants = {name: a for name, a in self.constants.items() if name in needed}
        return replace(self, nodes=tuple(reversed(kept)), constants=constants)

    def module(self) -> GraphModule:
        """A torch module of this graph, for training and for `quernstone.sensitivity`."""
        from quernstone.importers.module import GraphModule

        return GraphModule(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the graph as a safetensors file, see `importers.read_safetensors`."""
        from quernstone.importers.file import write_safetensors

        write_safetensors(self, path)


def check_finite(where: str, array: Any) -> None:
    """Refuses arrays with numbers that are not finite."""
    array = np.asarray(array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array[~np.isfinite(array)]
        raise ValueError(
            f"{where}: {bad.size} of {array.size} are {bad[0]}, expected finite numbers"
        )


def check_weights(graph: Graph) -> Graph:
    """The graph, if its weights are finite and no other constant has a NaN.

    Raises:
        ValueError: it is not so; the message names the layer.
    """
    for node in graph.nodes:
        for role in ("weight", "recurrent", "bias"):
            name = node.input(role)
            if name is not None and name in graph.constants:
                check_finite(f"{node.op} {node.name!r}: {role} {name!r}", graph.constants[name])
    for name, array in graph.constants.items():
        # A bound may be infinite: max(x, -inf).
        if array.dtype.kind == "f" and np.isnan(array).any():
            check_finite(repr(name), array)
    return graph


def _in_order(graph: Graph) -> tuple[Node, ...]:
    """The nodes, sorted where they are not."""
    sources = [("", ""), *((value.name, "an input") for value in graph.inputs)]
    sources += [(name, "a constant") for name in graph.constants]
    made: dict[str, str] = {}
    for name, what in sources:
        if name in made:
            raise ValueError(f"{name!r}: {what}, and {made[name]} too")
        made[name] = what
    producer: dict[str, Node] = {}
    for node in graph.nodes:
        for name in node.outputs:
            if name and (name in producer or name in made):
                other = producer[name].name if name in producer else made[name]
                raise ValueError(f"{name!r}: an output of {node.name!r}, and {other!r} too")
            producer[name] = node
    named = {node.name: node for node in graph.nodes}
    if len(named) < len(graph.nodes):
        names = [node.name for node in graph.nodes]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r}: a name of two nodes")
    before: dict[str, list[str]] = {}
    sorted_already, seen = True, set(made)
    for node in graph.nodes:
        for name in node.inputs:
            if name not in made and name not in producer:
                raise ValueError(f"{node.op} {node.name!r}: nothing makes its input {name!r}")
        sorted_already &= seen.issuperset(node.inputs)
        seen.update(node.outputs)
        before[node.name] = [producer[name].name for name in node.inputs if name not in made]
    for name in graph.outputs:
        if name not in seen:
            raise ValueError(f"outputs: nothing makes {name!r}")
    if sorted_already:
        return tuple(graph.nodes)
    try:
        order = tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        circle = " -> ".join(repr(name) for name in error.args[1])
        raise ValueError(f"nodes in a circle: {circle}") from None
    return tuple(named[name] for name in order)


def _check_node(node: Node, constants: Mapping[str, Array]) -> None:
    where = f"{node.op} {node.name!r}"
    if node.op not in ops.OPS:
        raise ValueError(f"{where}: unknown op, expected one of {', '.join(sorted(ops.OPS))}")
    schema = ops.schema(node.op)
    present = sum(bool(name) for name in node.inputs[: schema.needed])
    if present < schema.needed or (len(node.inputs) > len(schema.roles) and not schema.variadic):
        raise ValueError(f"{where}: got inputs {node.inputs}, expected {schema.roles}")
    for name in node.attributes:
        if name not in schema.attributes:
            raise ValueError(f"{where}: got attribute {name!r}, expected {list(schema.attributes)}")
    for name, needed in schema.attributes.items():
        if needed and name not in node.attributes:
            raise ValueError(f"{where}: attribute {name!r} is missing")
    weight = constants.get(node.input("weight") or "")
    bias = constants.get(node.input("bias") or "")
    if weight is not None:
        _check_weight(where, node, weight, bias)


def _check_weight(where: str, node: Node, weight: Array, bias: Array | None) -> None:
    groups = node.attributes.get("groups", 1)
    rank = {"linear": 2, "embedding": 2, "lstm": 2, "layer_norm": 1, "rms_norm": 1}
    if node.op in ("conv", "conv_transpose"):
        rank[node.op] = 2 + len(node.attributes["stride"])
    if node.op in rank and weight.ndim != rank[node.op]:
        raise ValueError(f"{where}: got weight {weight.shape}, expected {rank[node.op]} axes")
    out = weight.shape[0]
    if node.op == "conv" and (groups < 1 or out % groups):
        raise ValueError(f"{where}: got weight {weight.shape}, expected outputs in {groups} groups")
    if node.op == "conv_transpose":
        out = weight.shape[1] * groups
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"{where}: got bias {bias.shape}, expected ({out},)")


def _tensor(array: Tensor | Array) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _checked_inputs(
    values: Sequence[Value], inputs: Mapping[str, Tensor | Array]
) -> Iterator[tuple[str, Tensor]]:
    names = [value.name for value in values]
    for name in inputs:
        if name not in names:
            raise ValueError(f"inputs: got {name!r}, expected {names}")
    for value in values:
        if value.name not in inputs:
            raise ValueError(f"inputs: {value.name!r} is missing")
        tensor = _tensor(inputs[value.name])
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != value.dtype:
            raise ValueError(f"inputs[{value.name!r}]: got {dtype}, expected {value.dtype}")
        shape = value.shape
        if shape is not None and (
            len(shape) != tensor.ndim
            or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True))
        ):
            raise ValueError(
                f"inputs[{value.name!r}]: got shape {tuple(tensor.shape)}, expected {shape}"
            )
        yield value.name, tensor


def _uses(nodes: Iterable[Node]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    return uses


def _run_node(node: Node, given: tuple[Tensor | None, ...], hook: Hook | None) -> Sequence[Tensor]:
    made = None if hook is None else hook(node, given)
    if isinstance(made, Tensor):
        return [made]
    if made is not None:
        return made
    return evaluate(node, given)


def evaluate(node: Node, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs of a node, for hooks that change its inputs or its outputs.

    Raises:
        ValueError: it cannot take these shapes; the message names the op and the node.
    """
    try:
        return ops.evaluate(node.op, inputs, node.attributes)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = [None if x is None else tuple(x.shape) for x in inputs]
        raise ValueError(f"{node.op} {node.name!r} on {shapes}: {error}") from error
