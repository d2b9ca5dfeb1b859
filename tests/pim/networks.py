"""Small networks of the layers that lie in macros, with seeded weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quernstone.importers import Graph, Node, Value
from quernstone.pim.layers import Weight

CONVS: dict[str, dict[str, Any]] = {
    "plain": {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1},
    "padded": {"stride": (2, 1), "padding": ((1, 2), (0, 1)), "dilation": (1, 1), "groups": 1},
    "dilated": {"stride": (1, 2), "padding": ((2, 2), (2, 2)), "dilation": (2, 2), "groups": 1},
    "grouped": {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 2},
    "depthwise": {"stride": (2, 2), "padding": ((1, 1), (0, 2)), "dilation": (1, 1), "groups": 4},
}


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def conv(kind: str = "padded", channels: int = 4, outputs: int = 8) -> Graph:
    attributes = CONVS[kind]
    weight = normal(outputs, channels // attributes["groups"], 3, 3)
    return Graph(
        (Node("conv", "conv", ("x", "w", "b"), ("y",), attributes),),
        (Value("x", "float32", (None, channels, None, None)),),
        ("y",),
        {"w": weight, "b": normal(outputs, seed=1)},
    )


def conv1d() -> Graph:
    attributes = {"stride": (2,), "padding": ((1, 0),), "dilation": (1,), "groups": 1}
    return Graph(
        (Node("conv", "conv", ("x", "w"), ("y",), attributes),),
        (Value("x", "float32", (None, 3, None)),),
        ("y",),
        {"w": normal(5, 3, 4)},
    )


def transposed(groups: int = 1) -> Graph:
    attributes = {
        "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": groups,
        "output_padding": (0, 0),
    }  # fmt: skip
    return Graph(
        (Node("up", "conv_transpose", ("x", "w", "b"), ("y",), attributes),),
        (Value("x", "float32", (None, 4, None, None)),),
        ("y",),
        {"w": normal(4, 6 // groups, 2, 2), "b": normal(6, seed=1)},
    )


def perceptron(width: int = 40) -> Graph:
    """Two linear layers; the first one's weight has a negative mean, as shifts like it."""
    return Graph(
        (
            Node("first", "linear", ("x", "w1", "b1"), ("h",)),
            Node("relu", "relu", ("h",), ("a",)),
            Node("second", "linear", ("a", "w2"), ("y",)),
        ),
        (Value("x", "float32", (None, 24)),),
        ("y",),
        {
            "w1": normal(width, 24, seed=2) - 0.3,
            "b1": normal(width, seed=3),
            "w2": normal(9, width, seed=4),
        },
    )


def linear() -> Graph:
    return Graph(
        (Node("linear", "linear", ("x", "w", "b"), ("y",)),),
        (Value("x", "float32", (None, 24)),),
        ("y",),
        {"w": normal(40, 24, seed=2), "b": normal(40, seed=3)},
    )


def recurrent() -> Graph:
    return Graph(
        (Node("lstm", "lstm", ("x", "w", "r", "b"), ("y", "hn", "cn")),),
        (Value("x", "float32", (None, None, 6)),),
        ("y",),
        {"w": normal(20, 6), "r": normal(20, 5), "b": normal(20)},
    )


def tied() -> Graph:
    """A language model in small: the embedding is the last layer's weight."""
    return Graph(
        (
            Node("look", "embedding", ("ids", "w"), ("h",)),
            Node("head", "linear", ("h", "w"), ("y",)),
        ),
        (Value("ids", "int64", (None,)),),
        ("y",),
        {"w": normal(30, 8)},
    )


def rows(count: int, width: int, seed: int = 7) -> torch.Tensor:
    """Correlated inputs, as layers have them."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width // 2, width))
    x = random.normal(size=(count, width // 2)) @ mix + 0.3 * random.normal(size=(count, width))
    return torch.from_numpy(x.astype(np.float32))


def of(graph: Graph) -> Weight:
    from quernstone.pim.layers import weights_of

    return weights_of(graph)[0]
