"""What streams through macros: its products with the weights are the layers' own results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quernstone.importers import Graph, Node, Value
from quernstone.pim.work import Work, network_work, quantised_inputs
from tests.pim import networks


def conv_graph(shape: tuple[int, ...], kernel: tuple[int, ...], **attributes: Any) -> Graph:
    """A convolution of integers, whose result fp32 holds exactly."""
    dims = len(kernel)
    groups = attributes.get("groups", 1)
    weight = np.random.default_rng(1).integers(-8, 8, (6, shape[1] // groups, *kernel))
    settings = {"stride": [1] * dims, "padding": [(0, 0)] * dims, "dilation": [1] * dims}
    node = Node("layer", "conv", ("x", "w"), ("y",), {**settings, **attributes})
    return Graph((node,), (Value("x", "float32", None),), ("y",), {"w": weight.astype(np.float32)})


def integers(*shape: int) -> torch.Tensor:
    """0 to 255, both of them there, so that codes equal values."""
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:2] = torch.tensor([0, 255])
    return x.float()


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((2, 3, 7, 9), (3, 3), {}),
        ((1, 3, 8, 9), (3, 2), {"stride": [2, 3], "padding": [(1, 0), (2, 1)]}),
        ((1, 4, 9, 9), (3, 3), {"dilation": [2, 1]}),
        ((2, 5, 12), (4,), {"stride": [2], "padding": [(1, 2)]}),
        ((1, 5, 1, 1), (1, 1), {}),
    ],
)
def test_windows_times_weights_are_the_convolution(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    graph, x = conv_graph(shape, kernel, **attributes), integers(*shape)
    weight = graph.weight("layer").astype(np.int8)
    found = network_work(graph, {"x": x}, {"layer": weight}, vectors=10**6)
    (work,) = found.layers
    want = graph.run({"x": x})["y"]
    got = work.inputs.astype(np.int64) @ work.weights.T.astype(np.int64)
    flat = want.movedim(1, -1).reshape(-1, 6).numpy()
    np.testing.assert_array_equal(got, flat)
    assert work.vectors == len(work.inputs) == len(flat)
    assert found.share == 1.0


def test_the_vectors_kept_are_consecutive_ones_from_the_middle() -> None:
    graph, x = conv_graph((1, 3, 8, 8), (1, 1)), integers(1, 3, 8, 8)
    weight = graph.weight("layer").astype(np.int8)
    every, some = (
        network_work(graph, {"x": x}, {"layer": weight}, vectors=n).layers[0] for n in (64, 10)
    )
    np.testing.assert_array_equal(some.inputs, every.inputs[27:37])
    assert some.vectors == 64


def test_grouped_convolutions_are_counted_elsewhere() -> None:
    graph, x = conv_graph((1, 6, 5, 5), (3, 3), groups=3), integers(1, 6, 5, 5)
    found = network_work(graph, {"x": x}, {"layer": graph.weight("layer").astype(np.int8)})
    assert not found.layers
    assert found.elsewhere == {"layer": 6 * 9 * 2 * 9}
    assert found.share == 0.0


def test_attention_has_two_products_a_head_of_weights_that_are_not_known() -> None:
    node = Node("att", "attention", ("q", "k", "v"), ("y",), {"scale": 0.5, "causal": True})
    values = tuple(Value(name, "float32", None) for name in "qkv")
    graph = Graph((node,), values, ("y",), {})
    given = {name: torch.randn(1, 2, 5, 8) for name in "qkv"}
    works = network_work(graph, given, {}).layers
    assert [w.name for w in works] == ["att.qk.0.0", "att.av.0.0", "att.qk.0.1", "att.av.0.1"]
    assert [w.weights.shape for w in works[:2]] == [(5, 8), (8, 5)]
    assert not any(work.known for work in works)
    # The first query sees the first key alone: all of its share, 255, is there.
    assert works[1].inputs[0].tolist() == [255, 0, 0, 0, 0]


def test_codes_of_inputs_are_within_half_a_step() -> None:
    x = torch.randn(1000)
    codes = quantised_inputs(x, 6)
    scale = float((x.max() - x.min()) / 63)
    zero = round(-float(x.min()) / scale)
    assert codes.max() == 63
    assert codes.min() == 0
    np.testing.assert_allclose((codes.astype(float) - zero) * scale, x, atol=scale)
    assert quantised_inputs(torch.zeros(3)).tolist() == [0, 0, 0]


def test_bad_input_is_named() -> None:
    graph, x = conv_graph((1, 3, 8, 8), (1, 1)), integers(1, 3, 8, 8)
    weight = graph.weight("layer").astype(np.int8)
    for change, message in (
        ({"weights": {"other": weight}}, "other"),
        ({"weights": {"layer": weight[:2]}}, "shape"),
        ({"input_bits": 9}, "input_bits"),
        ({"vectors": 0}, "vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            network_work(graph, {"x": x}, **{"weights": {"layer": weight}, **change})  # type: ignore[arg-type]
    ones = np.ones((2, 3), np.int8)
    with pytest.raises(ValueError, match=r"inputs\.shape"):
        Work("a", ones, np.ones((2, 4), np.int8), 2)
    with pytest.raises(ValueError, match="vectors"):
        Work("a", ones, ones, 1)
    with pytest.raises(TypeError, match="weights"):
        Work("a", ones.astype(float), ones, 2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 24), "first: got no inputs"),
        (torch.full((3, 24), float("nan")), "first: got a number that is not finite"),
    ],
)
def test_inputs_without_a_range_are_blamed_on_their_layer(x: torch.Tensor, message: str) -> None:
    weights = {"first": np.zeros((40, 24), np.int8)}
    with pytest.raises(ValueError, match=message):
        network_work(networks.perceptron(), {"x": x}, weights)
