"""A graph as a torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quernstone.importers.graph import Graph, Node, evaluate


class GraphModule(nn.Module):
    """Computes what a graph computes; each layer with weights is a submodule under its name.

    A linear layer is a `torch.nn.Linear`, so that what looks for these finds it; other layers hold
    their constants as parameters by their roles: "weight", "bias", "recurrent". Constants that two
    layers share are one parameter. Dots in a name make modules within modules.

    Args:
        graph: copied; training changes the module alone, and `graph()` gives the result.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        shared: dict[str, nn.Parameter] = {}
        self._layers: dict[str, nn.Module] = {}
        for node in graph.nodes:
            parameters = {
                role: _parameter(graph, name, shared)
                for role in ("weight", "bias", "recurrent")
                if (name := node.input(role)) is not None and name in graph.constants
            }
            if not parameters:
                continue
            layer: nn.Module = _Layer()
            if node.op == "linear":
                rows, columns = parameters["weight"].shape
                layer = nn.Linear(columns, rows, "bias" in parameters, device="meta")
            for role, parameter in parameters.items():
                layer.register_parameter(role, parameter)
            self._layers[node.name] = layer
            _put(self, node.name, layer)

    def forward(
        self, inputs: Mapping[str, Tensor] | Tensor | None = None, **named: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """The outputs by name; the tensor itself where there is one output.

        Args:
            inputs: tensors by name, or the tensor of a graph with one input.
            named: inputs by name, as transformers calls its models.
        """
        if isinstance(inputs, Tensor):
            inputs = {self._graph.inputs[0].name: inputs}
        outputs = self._graph.run({**(inputs or {}), **named}, hook=self._hook)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def graph(self) -> Graph:
        """The graph with the weights as they are now."""
        constants = {}
        for node in self._graph.nodes:
            for role, parameter in self._roles(node):
                constants[node.input(role) or ""] = parameter.detach().numpy().copy()
        return self._graph.with_constants(constants)

    def _roles(self, node: Node) -> list[tuple[str, nn.Parameter]]:
        layer = self._layers.get(node.name)
        return [] if layer is None else list(layer.named_parameters(recurse=False))

    def _hook(
        self, node: Node, given: tuple[Tensor | None, ...]
    ) -> Tensor | Sequence[Tensor] | None:
        layer = self._layers.get(node.name)
        if layer is None:
            return None
        if isinstance(layer, nn.Linear):
            out: Tensor = layer(given[0])
            return out
        roles = dict(self._roles(node))
        names = (node.input(role) for role in roles)
        put: dict[str | None, Any] = dict(zip(names, roles.values(), strict=True))
        inputs = [put.get(name, x) for name, x in zip(node.inputs, given, strict=True)]
        return layer(node, inputs)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Holds a layer's parameters, and is where hooks of torch see it run."""

    def forward(self, node: Node, inputs: Sequence[Tensor | None]) -> Any:
        made = evaluate(node, inputs)
        return made[0] if len(made) == 1 else tuple(made)


def _parameter(graph: Graph, name: str, shared: dict[str, nn.Parameter]) -> nn.Parameter:
    if name not in shared:
        array = graph.constants[name]
        shared[name] = nn.Parameter(torch.tensor(array), requires_grad=array.dtype.kind == "f")
    return shared[name]


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    *folders, last = name.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, nn.Module())
        root = root._modules[folder]  # type: ignore[assignment]
    root.add_module(last, layer)
