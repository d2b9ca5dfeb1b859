"""What a graph promises: it is whole, its weights can be replaced and its nodes watched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quernstone.importers import Graph, Node, Value, evaluate, read
from quernstone.sensitivity import layer_hessian
from tests.importers.tiny import normal

CONV = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
X = Value("x", "float32", (None, 4))


def two_layers() -> Graph:
    """y = w2 relu(w1 x + b1), the nodes in the wrong order."""
    return Graph(
        (
            Node("second", "linear", ("r", "w2"), ("y",)),
            Node("first", "linear", ("x", "w1", "b1"), ("h",)),
            Node("bend", "relu", ("h",), ("r",)),
        ),
        (X,),
        ("y",),
        {"w1": normal(6, 4), "b1": normal(6), "w2": normal(3, 6)},
        {"author": "somebody"},
    )


def by_hand(graph: Graph, x: Any) -> Any:
    w1, b1, w2 = (graph.constants[name] for name in ("w1", "b1", "w2"))
    return np.maximum(x @ w1.T + b1, 0) @ w2.T


def test_nodes_are_sorted_and_run() -> None:
    graph = two_layers()
    assert [node.name for node in graph.nodes] == ["first", "bend", "second"]
    x = normal(5, 4)
    np.testing.assert_allclose(graph.run({"x": x})["y"], by_hand(graph, x), rtol=1e-5)
    assert [layer.name for layer in graph.layers()] == ["first", "second"]
    assert graph.weight("first", "bias") is graph.constants["b1"]
    assert "3 nodes" in repr(graph)


def test_constants_are_replaced_in_a_copy() -> None:
    graph = two_layers()
    weight = normal(3, 6, seed=1)
    changed = graph.with_constants({"w2": weight})
    x = normal(5, 4)
    np.testing.assert_allclose(changed.run({"x": x})["y"], by_hand(changed, x), rtol=1e-5)
    np.testing.assert_array_equal(graph.constants["w2"], normal(3, 6))
    weight[:] = 0
    np.testing.assert_array_equal(changed.constants["w2"], normal(3, 6, seed=1))


def test_constants_of_one_run_have_gradients() -> None:
    graph, x = two_layers(), normal(5, 4)
    weight = torch.tensor(graph.constants["w1"], dtype=torch.float64, requires_grad=True)
    others = {name: torch.tensor(graph.constants[name]).double() for name in ("b1", "w2")}
    wide = Graph(graph.nodes, (Value("x", "float64", None),), graph.outputs, graph.constants)

    def loss(w: Tensor) -> Tensor:
        return wide.run({"x": x.astype(np.float64)}, constants={"w1": w, **others})["y"].sum()

    assert torch.autograd.gradcheck(loss, (weight,))


def test_a_hook_sees_the_inputs_of_every_node_in_order() -> None:
    graph, x = two_layers(), normal(5, 4)
    seen: dict[str, list[tuple[int, ...]]] = {}

    def watch(node: Node, inputs: tuple[Tensor | None, ...]) -> None:
        seen[node.name] = [tuple(t.shape) for t in inputs if t is not None]

    graph.run({"x": x}, hook=watch)
    assert list(seen) == ["first", "bend", "second"]
    assert seen["first"] == [(5, 4), (6, 4), (6,)]


def test_a_hook_can_compute_a_node_itself() -> None:
    graph, x = two_layers(), normal(5, 4)

    def doubled(node: Node, inputs: tuple[Tensor | None, ...]) -> Tensor | Sequence[Tensor] | None:
        return [2 * evaluate(node, inputs)[0]] if node.name == "second" else None

    got = graph.run({"x": x}, hook=doubled)["y"]
    np.testing.assert_allclose(got, 2 * by_hand(graph, x), rtol=1e-5)


def test_any_tensor_can_be_asked_for() -> None:
    graph, x = two_layers(), normal(5, 4)
    found = graph.run({"x": x}, outputs=["r", "x", "w1"])
    assert list(found) == ["r", "x", "w1"]
    assert float(found["r"].min()) == 0.0
    with pytest.raises(ValueError, match="outputs: got 'nothing'"):
        graph.run({"x": x}, outputs=["nothing"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w3": normal(3, 6)}, "'w3' is none of this graph's"),
        ({"w2": normal(6, 3)}, r"\(6, 3\), expected \(3, 6\)"),
        ({"w2": np.full((3, 6), np.nan)}, "'w2'.*: 18 of 18 are nan, expected finite numbers"),
    ],
)
def test_constants_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_layers().with_constants(change)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'x' is missing"),
        ({"x": normal(5, 4), "z": normal(1)}, r"got 'z', expected \['x'\]"),
        ({"x": normal(5, 4).astype(np.float64)}, "got float64, expected float32"),
        ({"x": normal(5, 3)}, r"got shape \(5, 3\), expected \(None, 4\)"),
        ({"x": normal(4)}, r"got shape \(4,\), expected \(None, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_layers().run(inputs)


def test_a_node_that_cannot_take_its_inputs_is_named() -> None:
    graph = Graph((Node("sum", "add", ("x", "c"), ("y",)),), (X,), ("y",), {"c": normal(3)})
    with pytest.raises(ValueError, match=r"add 'sum' on \[\(5, 4\), \(3,\)\]"):
        graph.run({"x": normal(5, 4)})


NODE = Node("a", "relu", ("x",), ("y",))
WRONG: dict[str, tuple[list[Node], dict[str, Any], str]] = {
    "nodes in a circle": (
        [Node("a", "add", ("x", "q"), ("p",)), Node("b", "relu", ("p",), ("q",)),
         Node("c", "relu", ("q",), ("y",))],
        {},
        "nodes in a circle: '[ab]' -> '[ab]' -> '[ab]'",
    ),
    "a node of its own output": ([Node("a", "add", ("x", "y"), ("y",))], {}, "in a circle"),
    "an input that nothing makes": (
        [Node("a", "relu", ("z",), ("y",))], {}, "relu 'a': nothing makes its input 'z'"),
    "an output that nothing makes": ([Node("a", "relu", ("x",), ("z",))], {}, "nothing makes 'y'"),
    "two nodes of one name": (
        [NODE, Node("a", "relu", ("x",), ("z",))], {}, "'a': a name of two nodes"),
    "two nodes that make one tensor": (
        [NODE, Node("b", "relu", ("x",), ("y",))], {}, "'y': an output of 'b', and 'a' too"),
    "a constant of an input's name": ([NODE], {"x": normal(1)}, "'x': a constant, and an input"),
    "an unknown op": ([Node("a", "rela", ("x",), ("y",))], {}, "rela 'a': unknown op"),
    "too few inputs": ([Node("a", "add", ("x",), ("y",))], {}, "expected .'a', 'b'."),
    "too many inputs": ([Node("a", "relu", ("x", "x"), ("y",))], {}, "expected .'x',."),
    "an attribute too many": (
        [Node("a", "relu", ("x",), ("y",), {"alpha": 1})], {}, "got attribute 'alpha'"),
    "an attribute too few": ([Node("a", "softmax", ("x",), ("y",))], {}, "'axis' is missing"),
    "a matrix of three axes": (
        [Node("a", "linear", ("x", "w"), ("y",))], {"w": normal(2, 3, 4)}, "expected 2 axes"),
    "a bias of another length": (
        [Node("a", "linear", ("x", "w", "b"), ("y",))], {"w": normal(3, 4), "b": normal(4)},
        r"linear 'a': got bias \(4,\), expected \(3,\)"),
    "groups that do not divide": (
        [Node("a", "conv", ("x", "w"), ("y",), {**CONV, "groups": 2})], {"w": normal(3, 2, 1, 1)},
        "expected outputs in 2 groups"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_graph_that_is_not_whole_is_refused(name: str) -> None:
    nodes, constants, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Graph(tuple(nodes), (X,), ("y",), constants)


def shapely() -> Graph:
    """Rows of x, summed in pairs, by arithmetic with its shape."""
    constants = {
        **{"zero": np.array(0), "one": np.array([1]), "two": np.array([2])},
        **{"w": normal(3, 4), "least": np.array([-1])},
    }
    nodes = (
        Node("shape", "shape", ("x",), ("s",)),
        Node("rows", "gather", ("s", "zero"), ("n",), {"axis": 0}),
        Node("row", "unsqueeze", ("n",), ("m",), {"axes": (0,)}),
        Node("pairs", "div", ("m", "two"), ("p",)),
        Node("target", "concat", ("p", "two", "least"), ("t",), {"axis": 0}),
        Node("cut", "reshape", ("x", "t"), ("c",)),
        Node("sum", "sum", ("c",), ("d",), {"axes": (1,), "keep": False}),
        Node("last", "linear", ("d", "w"), ("y",)),
    )
    return Graph(nodes, (X,), ("y",), constants)


def test_fixed_shapes_leave_no_arithmetic_with_shapes() -> None:
    graph, x = shapely(), normal(6, 4)
    fixed = graph.specialised({"x": (6, 4)})
    assert [node.op for node in fixed.nodes] == ["reshape", "sum", "linear"]
    assert fixed.shapes["c"] == (3, 2, 4)
    assert fixed.shapes["y"] == (3, 3)
    assert fixed.inputs == (Value("x", "float32", (6, 4)),)
    torch.testing.assert_close(fixed.run({"x": x}), graph.run({"x": x}), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got shape \(8, 4\), expected \(6, 4\)"):
        fixed.run({"x": normal(8, 4)})
    with pytest.raises(ValueError, match="inputs: 'x' is missing"):
        graph.specialised({})


def test_a_saved_graph_is_the_same(tmp_path: Path) -> None:
    for index, graph in enumerate((two_layers(), shapely().specialised({"x": (6, 4)}))):
        path = tmp_path / f"{index}.safetensors"
        graph.save(path)
        again = read(path)
        for part in ("nodes", "inputs", "outputs", "metadata", "shapes"):
            assert getattr(again, part) == getattr(graph, part)
        assert list(again.constants) == sorted(graph.constants)
        for name, array in graph.constants.items():
            np.testing.assert_array_equal(again.constants[name], array)
            assert again.constants[name].dtype == array.dtype


def test_a_module_computes_the_graph_and_gives_its_weights_back() -> None:
    graph = two_layers()
    module = graph.module()
    assert set(dict(module.named_parameters())) == {"first.weight", "first.bias", "second.weight"}
    x = torch.from_numpy(normal(5, 4))
    module(x).square().sum().backward()
    layer = module.get_submodule("first")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight -= 0.1 * layer.weight.grad
    trained = module.graph()
    torch.testing.assert_close(trained.run({"x": x})["y"], module(x).detach(), rtol=0, atol=0)
    assert not np.array_equal(trained.constants["w1"], graph.constants["w1"])
    assert np.array_equal(graph.constants["w1"], normal(6, 4))


def test_a_module_has_the_hessians_of_its_layers() -> None:
    graph, x = two_layers(), normal(50, 4)
    found = layer_hessian(graph.module(), ["first"], [torch.from_numpy(x)], dtype=torch.float64)
    wanted = 2 / len(x) * x.T.astype(np.float64) @ x
    np.testing.assert_allclose(found["first"].numpy(), wanted, rtol=1e-6)


def test_a_weight_that_two_layers_share_is_one_parameter() -> None:
    nodes = (
        Node("in.table", "embedding", ("x", "w"), ("h",)),
        Node("in", "relu", ("h",), ("r",)),
        Node("out", "linear", ("r", "w"), ("y",)),
    )
    graph = Graph(nodes, (Value("x", "int64", None),), ("y",), {"w": normal(7, 4)})
    module = graph.module()
    assert len(list(module.parameters())) == 1
    module(torch.tensor([[1, 2]])).sum().backward()
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    np.testing.assert_array_equal(module.graph().constants["w"], 2 * normal(7, 4))
