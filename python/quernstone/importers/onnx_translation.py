"""A graph in the making, as the translations of ONNX's operators see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quernstone.importers.folding import fold_node
from quernstone.importers.graph import Array, Node
from quernstone.importers.onnx_file import Model, OnnxNode


class Unsupported(ValueError):
    """An operator, or a use of it, that a graph cannot hold."""


class Translation:
    """Collects nodes and constants."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = dict(model.constants)
        self.alias: dict[str, str] = {"": ""}
        self.taken = set(model.names)

    def same(self, output: str, name: str) -> None:
        """Makes an output another name of a tensor."""
        if self.source(name) == output:
            raise ValueError(f"nodes in a circle: {output!r} is made from itself")
        self.alias[output] = name

    def source(self, name: str) -> str:
        """The tensor itself, where the name is another one of it."""
        while name in self.alias and name:
            name = self.alias[name]
        return name

    def emit(
        self,
        node: OnnxNode,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node; without `outputs` it makes a tensor of a new name, which is returned."""
        if outputs is None:
            outputs = (self.fresh(f"{node.outputs[0]}.{op}"),)
        name = node.name if outputs[0] == node.outputs[0] else self.fresh(f"{node.name}.{op}")
        inputs = [self.source(name) for name in inputs]
        while inputs and not inputs[-1]:
            inputs.pop()
        made = Node(name, op, tuple(inputs), tuple(outputs), attributes)
        # At once: the nodes that follow may need to know the value.
        if not fold_node(made, self.constants):
            self.nodes.append(made)
        return outputs[0]

    def constant(self, node: OnnxNode, role: str, value: Any, dtype: Any = None) -> str:
        name = self.fresh(f"{node.name}.{role}")
        self.constants[name] = np.array(value, dtype)
        return name

    def fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.taken:
            count += 1
            unique = f"{name}.{count}"
        self.taken.add(unique)
        return unique

    def known(self, name: str) -> Array | None:
        """The value of a tensor that is a constant."""
        return self.constants.get(self.source(name))

    def number(self, node: OnnxNode, index: int, default: Any = None) -> Any:
        """The constant input at an index, as an array; the default where it is absent."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return default
        value = self.known(node.inputs[index])
        if value is None:
            raise Unsupported(f"its input {node.inputs[index]!r} is no constant")
        return value

    def integers(self, node: OnnxNode, index: int, attribute: str) -> tuple[int, ...] | None:
        """Whole numbers that older opsets keep in an attribute and newer ones in an input."""
        if attribute in node.attributes:
            return tuple(node.attributes[attribute])
        value = self.number(node, index)
        return None if value is None else tuple(int(n) for n in value.reshape(-1))

    def long(self, node: OnnxNode, name: str) -> str:
        """A tensor of whole numbers as int64."""
        value = self.known(name)
        if value is not None and value.dtype == np.int64:
            return name
        return self.emit(node, "cast", [name], dtype="int64")

    def rank(self, name: str) -> int | None:
        return self.model.ranks.get(name)

    def from_end(self, name: str, axis: int) -> int:
        """An axis counted from the end, where the rank is known."""
        rank = self.rank(name)
        return axis if rank is None or axis < 0 else axis - rank
