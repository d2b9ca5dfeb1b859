"""ONNX files give what onnxruntime gives: read, fused, and written again."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch.nn.functional import scaled_dot_product_attention

from quernstone.importers import Graph, Node, Value, read_onnx, write_onnx
from tests.importers.tiny import TOLERANCE, check, close, model, node, normal, ops, oracle, write

# name: nodes, inputs with their shapes, constants; the output is y.
CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "plain": ({}, (2, 3, 9, 11), (5, 3, 3, 3)),
    "one axis": ({"strides": [2], "pads": [1, 1]}, (2, 4, 17), (6, 4, 5)),
    "three axes": ({"pads": [1] * 6}, (1, 2, 5, 4, 6), (3, 2, 3, 3, 3)),
    "groups": ({"group": 2, "strides": [2, 1]}, (2, 4, 8, 7), (6, 2, 3, 2)),
    "depthwise": ({"group": 6, "pads": [2, 2, 2, 2]}, (2, 6, 8, 8), (6, 1, 5, 5)),
    "dilated": ({"dilations": [2, 3]}, (1, 2, 13, 12), (4, 2, 3, 3)),
    "padded unevenly": ({"pads": [0, 2, 1, 0]}, (2, 3, 7, 7), (4, 3, 3, 3)),
}
TRANSPOSED: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "plain": ({"strides": [2, 2]}, (2, 3, 5, 6), (3, 4, 2, 2)),
    "one axis": ({"strides": [3], "pads": [1, 1]}, (2, 4, 6), (4, 3, 5)),
    "groups": ({"group": 2, "strides": [2, 2]}, (1, 4, 5, 5), (4, 3, 3, 3)),
    "grown": ({"strides": [2, 2], "output_padding": [1, 0], "pads": [1] * 4}, (1, 2, 4, 4),
              (2, 3, 3, 3)),
    "cut unevenly": ({"strides": [2, 2], "pads": [0, 1, 2, 0]}, (1, 2, 5, 6), (2, 3, 4, 3)),
    "dilated": ({"dilations": [2, 2]}, (1, 2, 5, 5), (2, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_of_any_kind(name: str, tmp_path: Path) -> None:
    attributes, x, w = CONVOLUTIONS[name]
    nodes = [node("Conv", "x w b", "y", **attributes)]
    constants = {"w": normal(*w), "b": normal(w[0])}
    graph = check(write(model(nodes, {"x": x}, constants), tmp_path / "a.onnx"), {"x": normal(*x)})
    assert ops(graph) == ["conv"]


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_of_any_kind(name: str, tmp_path: Path) -> None:
    attributes, x, w = TRANSPOSED[name]
    out = w[1] * attributes.get("group", 1)
    nodes = [
        node("ConvTranspose", "x w b", "h", **attributes),
        node("Mul", "h s", "z"),
        node("Add", "z t", "y"),
    ]
    ones = (1,) * (len(w) - 2)
    constants = {"w": normal(*w), "b": normal(out), "s": normal(out, *ones)}
    constants["t"] = normal(1, out, *ones)
    graph = check(write(model(nodes, {"x": x}, constants), tmp_path / "a.onnx"), {"x": normal(*x)})
    assert ops(graph) == ["conv_transpose"]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("state", [False, True])
def test_an_lstm_in_any_direction(direction: str, state: bool, tmp_path: Path) -> None:
    t, b, c, d = 5, 3, 4, 6
    n = 2 if direction == "bidirectional" else 1
    names = "x w u b _ h c" if state else "x w u b"
    nodes = [node("LSTM", names, "y yh yc", hidden_size=d, direction=direction)]
    constants = {"w": normal(n, 4 * d, c), "u": normal(n, 4 * d, d), "b": normal(n, 8 * d)}
    shapes = {"x": (t, b, c)}
    if state:
        shapes |= {"h": (n, b, d), "c": (n, b, d)}
    path = write(model(nodes, shapes, constants, ("y", "yh", "yc")), tmp_path / "a.onnx")
    check(path, {name: normal(*shape, seed=1) for name, shape in shapes.items()})


# Pairs of nodes and constants; x is [2, 3, 8, 10].
SMALL: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "max pool": ([node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 2],
                       pads=[1, 0, 0, 1])], {}),
    "max pool, dilated": ([node("MaxPool", "x", "y", kernel_shape=[2, 2], dilations=[2, 3])], {}),
    "max pool, ceil": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[3, 2],
                             ceil_mode=1)], {}),
    "average pool": ([node("AveragePool", "x", "y", kernel_shape=[3, 2], strides=[2, 2],
                           pads=[1, 0, 0, 1])], {}),
    "average pool over padding": ([node("AveragePool", "x", "y", kernel_shape=[3, 3],
                                        pads=[1, 1, 1, 1], count_include_pad=1)], {}),
    "average pool, ceil": ([node("AveragePool", "x", "y", kernel_shape=[3, 3], strides=[3, 2],
                                 ceil_mode=1)], {}),
    "global pools": ([node("GlobalAveragePool", "x", "a"), node("GlobalMaxPool", "x", "b"),
                      node("Add", "a b", "y")], {}),
    "nearest": ([node("Resize", "x _ s", "y", mode="nearest", nearest_mode="floor",
                      coordinate_transformation_mode="asymmetric")],
                {"s": np.array([1, 1, 2, 3], np.float32)}),
    "nearest to a size": ([node("Resize", "x _ _ s", "y", mode="nearest", nearest_mode="floor",
                                coordinate_transformation_mode="asymmetric")],
                          {"s": np.array([2, 3, 12, 5])}),
    "linear": ([node("Resize", "x _ s", "y", mode="linear")],
               {"s": np.array([1, 1, 1.7, 0.6], np.float32)}),
    "linear between corners": ([node("Resize", "x _ _ s", "y", mode="linear",
                                     coordinate_transformation_mode="align_corners")],
                               {"s": np.array([2, 3, 13, 7])}),
    "reflected": ([node("Pad", "x p", "y", mode="reflect")],
                  {"p": np.array([0, 0, 2, 1, 0, 0, 3, 4])}),
    "reflected channels": ([node("Pad", "x p", "y", mode="reflect")],
                           {"p": np.array([0, 2, 0, 1, 0, 1, 0, 0])}),
    "edge": ([node("Pad", "x p", "y", mode="edge")], {"p": np.array([0, 1, 2, 1, 1, 0, 3, 4])}),
    "filled": ([node("Pad", "x p v", "y")],
               {"p": np.array([1, 0, 0, 2, 0, 1, 1, 0]), "v": np.float32(0.5)}),
    "sliced backwards": ([node("Slice", "x a b c d", "y")],
                         {"a": np.array([-1, 7]), "b": np.array([-9, 1]),
                          "c": np.array([2, 3]), "d": np.array([-1, 2])}),
    "sliced to the end": ([node("Slice", "x a b c", "y")],
                          {"a": np.array([-3]), "b": np.array([2**63 - 1]), "c": np.array([-1])}),
    "split": ([node("Split", "x s", "a b", axis=3), node("Concat", "b a", "y", axis=-1)],
              {"s": np.array([4, 6])}),
    "split evenly": ([node("Split", "x", "a b", axis=-1), node("Mul", "a b", "y")], {}),
    "gathered": ([node("Gather", "x i", "y", axis=2)], {"i": np.array([[0, -1], [3, 2]])}),
    "flat": ([node("Flatten", "x", "y", axis=2)], {}),
    "shape arithmetic": ([node("Shape", "x", "s"), node("Gather", "s i", "h", axis=0),
                          node("Div", "h two", "k"), node("Concat", "z k m", "t", axis=0),
                          node("Reshape", "x t", "y")],
                         {"i": np.array([2]), "two": np.array([2]), "z": np.array([0, 0]),
                          "m": np.array([-1])}),
    "expanded": ([node("Shape", "x", "s"), node("ReduceMean", "x", "m", axes=[0]),
                  node("Expand", "m s", "y")], {}),
    "filled by shape": ([node("Shape", "x", "s"), node("ConstantOfShape", "s", "o"),
                         node("Add", "x o", "y")], {}),
    "reduced": ([node("ReduceMax", "x", "a", axes=[1, 3]), node("ReduceMin", "x", "b", axes=[-1]),
                 node("ReduceSum", "x i", "c", keepdims=0), node("Sub", "a b", "d"),
                 node("Add", "d c", "y")], {"i": np.array([0, 1])}),
    "chosen": ([node("Greater", "x z", "g"), node("Not", "g", "n"), node("Where", "n x z", "y")],
               {"z": np.float32(0.3)}),
    "several sums": ([node("Sum", "x c x", "a"), node("Max", "a c x", "b"),
                      node("Min", "b c", "y")], {"c": normal(8, 10)}),
    "old softmax": ([node("Softmax", "x", "y", axis=-1)], {}),
    "layer norm": ([node("LayerNormalization", "x w b", "y", epsilon=1e-3)],
                   {"w": normal(10), "b": normal(10)}),
    "squeezed": ([node("Unsqueeze", "x a", "u"), node("Squeeze", "u b", "y")],
                 {"a": np.array([0, -1]), "b": np.array([0])}),
    "activations": ([node("LeakyRelu", "x", "a", alpha=0.2), node("HardSigmoid", "a", "b"),
                     node("HardSwish", "b", "c"), node("Clip", "c lo", "d"), node("Exp", "d", "e"),
                     node("Sqrt", "e", "f"), node("Reciprocal", "f", "g"), node("Neg", "g", "h"),
                     node("Abs", "h", "i"), node("Log", "i", "j"), node("Tanh", "j", "k"),
                     node("Erf", "k", "y")], {"lo": np.float32(-0.1)}),
    "tiled": ([node("Tile", "x r", "y")], {"r": np.array([1, 2, 1, 3])}),
    "cast": ([node("Cast", "x", "a", to=TensorProto.INT32), node("Cast", "a", "y",
                                                                  to=TensorProto.FLOAT)], {}),
    "counted": ([node("Range", "a b c", "r"), node("Cast", "r", "f", to=TensorProto.FLOAT),
                 node("Add", "x f", "y")],
                {"a": np.int64(3), "b": np.int64(23), "c": np.int64(2)}),
    "from the left": ([node("MatMul", "w x", "y")], {"w": normal(6, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_small_graph(name: str, tmp_path: Path) -> None:
    nodes, constants = SMALL[name]
    path = write(model(nodes, {"x": (2, 3, 8, 10)}, constants), tmp_path / "a.onnx")
    check(path, {"x": normal(2, 3, 8, 10)})


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_softmax_before_opset_13_takes_the_last_axes_as_one(axis: int, tmp_path: Path) -> None:
    proto = model([node("Softmax", "x", "y", axis=axis)], {"x": (2, 3, 4, 5)}, {}, opset=11)
    check(write(proto, tmp_path / "a.onnx"), {"x": normal(2, 3, 4, 5)})


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("bias", [(5,), (1,), (1, 5), (4, 1), ()])
def test_gemm_with_any_bias_is_a_linear_layer_or_a_product(
    turned: int, bias: tuple[int, ...], tmp_path: Path
) -> None:
    x, w = ((3, 4), (5, 3)) if turned else ((4, 3), (3, 5))
    nodes = [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0, transA=turned, transB=turned)]
    constants = {"w": normal(*w), "b": normal(*bias)}
    path = write(model(nodes, {"x": x}, constants), tmp_path / "a.onnx")
    graph = check(path, {"x": normal(*x)})
    assert ("linear" in ops(graph)) == (bias != (4, 1))


def test_batch_norm_becomes_part_of_the_convolution_before_it(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c", group=2),
        node("BatchNormalization", "c g b m v", "n", epsilon=1e-3),
        node("Relu", "n", "y"),
    ]
    constants = {"w": normal(6, 2, 3, 3), "g": normal(6), "b": normal(6), "m": normal(6)}
    constants["v"] = np.abs(normal(6, seed=1))
    path = write(model(nodes, {"x": (2, 4, 7, 7)}, constants), tmp_path / "a.onnx")
    assert ops(check(path, {"x": normal(2, 4, 7, 7)})) == ["conv", "relu"]


def test_scales_and_shifts_become_part_of_a_linear_layer(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Add", "b a", "c"),
        node("Div", "c s", "d"),
        node("Sub", "d b", "e"),
        node("Mul", "t e", "y"),
    ]
    constants = {"w": normal(4, 6), "b": normal(6), "s": 1 + normal(6) ** 2, "t": np.float32(-2)}
    path = write(model(nodes, {"x": (3, 4)}, constants), tmp_path / "a.onnx")
    assert ops(check(path, {"x": normal(3, 4)})) == ["linear"]


@pytest.mark.parametrize(
    ("name", "constant", "other"),
    [
        ("a result that is used elsewhere", normal(5, 1, 1), "c"),
        ("a constant for each pixel", normal(1, 5, 6, 6), "x"),
        ("a constant along another axis", normal(6), "x"),
        ("a constant that adds an axis", normal(1, 1, 5, 1, 1), "x"),
    ],
)
def test_what_is_no_scale_of_the_layer_alone_stays(
    name: str, constant: Any, other: str, tmp_path: Path
) -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c s", "m"), node("Abs", other, "o")]
    nodes += [node("ReduceSum", "m", "p"), node("ReduceSum", "o", "q"), node("Add", "p q", "y")]
    constants = {"w": normal(5, 3, 3, 3), "s": constant}
    path = write(model(nodes, {"x": (2, 3, 8, 8)}, constants), tmp_path / "a.onnx")
    graph = check(path, {"x": normal(2, 3, 8, 8)})
    assert "mul" in ops(graph)
    np.testing.assert_array_equal(graph.constants["w"], constants["w"])


def test_a_weight_that_two_layers_share_is_scaled_in_one_of_them_alone(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "a"),
        node("Mul", "a s", "b"),
        node("Conv", "b w", "c"),
        node("Relu", "c", "y"),
    ]
    constants = {"w": normal(3, 3, 1, 1), "s": normal(3, 1, 1)}
    path = write(model(nodes, {"x": (1, 3, 4, 4)}, constants), tmp_path / "a.onnx")
    graph = check(path, {"x": normal(1, 3, 4, 4)})
    assert ops(graph) == ["conv", "conv", "relu"]
    np.testing.assert_array_equal(graph.weight(graph.nodes[1]), constants["w"])


HALF, ROOT = np.float32(0.5), np.float32(math.sqrt(0.5))
# The nodes between x [2, 3, 4, 8] and y, their constants, and the op that they are.
PATTERNS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "hard swish": ([node("Add", "x three", "a"), node("Clip", "a zero six", "b"),
                    node("Mul", "x b", "c"), node("Div", "c six", "y")], {}, "hard_swish"),
    "hard swish of a scaled clip": ([node("Add", "three x", "a"), node("Clip", "a zero six", "b"),
                                     node("Div", "b six", "c"), node("Mul", "c x", "y")], {},
                                    "hard_swish"),
    "swish": ([node("Sigmoid", "x", "a"), node("Mul", "a x", "y")], {}, "silu"),
    "swish with beta 1": ([node("Mul", "x one", "b"), node("Sigmoid", "b", "a"),
                           node("Mul", "x a", "y")], {}, "silu"),
    "gelu": ([node("Mul", "x root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"),
              node("Mul", "x c", "d"), node("Mul", "d half", "y")], {}, "gelu"),
    "gelu halved first": ([node("Div", "x rooted", "a"), node("Erf", "a", "b"),
                           node("Add", "one b", "c"), node("Mul", "half x", "d"),
                           node("Mul", "d c", "y")], {}, "gelu"),
    "gelu by tanh": ([node("Mul", "x x", "a"), node("Mul", "a x", "b"), node("Mul", "b k", "c"),
                      node("Add", "x c", "d"), node("Mul", "d p", "e"), node("Tanh", "e", "f"),
                      node("Add", "f one", "g"), node("Mul", "x half", "h"),
                      node("Mul", "h g", "y")], {}, "gelu"),
    "layer norm": ([node("ReduceMean", "x", "m", axes=[3]), node("Sub", "x m", "d"),
                    node("Pow", "d two", "q"), node("ReduceMean", "q", "v", axes=[-1]),
                    node("Add", "v eps", "e"), node("Sqrt", "e", "s"), node("Div", "d s", "n"),
                    node("Mul", "w n", "o"), node("Add", "o b", "y")],
                   {"w": normal(8), "b": normal(8, seed=1)}, "layer_norm"),
}  # fmt: skip
NUMBERS = {
    **{"zero": 0, "half": HALF, "one": 1, "two": 2, "three": 3, "six": 6, "eps": 1e-5},
    **{"root": ROOT, "rooted": math.sqrt(2), "k": 0.044715, "p": math.sqrt(2 / math.pi)},
}


def _pattern(nodes: list[Any], constants: dict[str, Any], path: Path) -> Path:
    numbers = {name: np.float32(value) for name, value in NUMBERS.items()}
    return write(model(nodes, {"x": (2, 3, 4, 8)}, {**numbers, **constants}), path)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_becomes_one_node(name: str, tmp_path: Path) -> None:
    nodes, constants, op = PATTERNS[name]
    graph = check(_pattern(nodes, constants, tmp_path / "a.onnx"), {"x": normal(2, 3, 4, 8)})
    assert ops(graph) == [op]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_whose_inside_is_used_elsewhere_stays(name: str, tmp_path: Path) -> None:
    nodes, constants, op = PATTERNS[name]
    inner = nodes[-2].output[0]
    outside = [*nodes[:-1], node(nodes[-1].op_type, " ".join(nodes[-1].input), "z")]
    outside.append(node("Add", f"z {inner}", "y"))
    graph = check(_pattern(outside, constants, tmp_path / "a.onnx"), {"x": normal(2, 3, 4, 8)})
    assert op not in ops(graph)


def test_a_pattern_with_another_number_stays(tmp_path: Path) -> None:
    nodes, constants, _ = PATTERNS["hard swish"]
    path = _pattern(nodes, {**constants, "three": np.float32(3.1)}, tmp_path / "a.onnx")
    assert "hard_swish" not in ops(check(path, {"x": normal(2, 3, 4, 8)}))


def test_a_pattern_of_two_tensors_that_are_one_elsewhere_stays(tmp_path: Path) -> None:
    nodes = [node("Abs", "x", "z"), node("Sigmoid", "x", "a"), node("Mul", "z a", "y")]
    path = write(model(nodes, {"x": (2, 3)}, {}), tmp_path / "a.onnx")
    assert ops(check(path, {"x": normal(2, 3)})) == ["abs", "sigmoid", "mul"]


@pytest.mark.parametrize(("t", "s"), [(4, 4), (2, 5), (1, 3)])
def test_causal_attention_ends_where_the_keys_end(t: int, s: int, tmp_path: Path) -> None:
    shapes = {"q": (2, 3, t, 4), "k": (2, 3, s, 4), "v": (2, 3, s, 4)}
    inputs = {name: normal(*shape) for name, shape in shapes.items()}
    graph = Graph(
        (Node("a", "attention", tuple(shapes), ("y",), {"scale": 0.5, "causal": True}),),
        tuple(Value(name, "float32", (None, 3, None, 4)) for name in shapes),
        ("y",),
        {},
    )
    q, k, v = (torch.from_numpy(array) for array in inputs.values())
    seen = torch.arange(s) <= torch.arange(t)[:, None] + s - t
    want = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5).numpy()
    close(graph, inputs, [want])
    write_onnx(graph, tmp_path / "a.onnx")
    np.testing.assert_allclose(oracle(tmp_path / "a.onnx", inputs)[0], want, **TOLERANCE)


@pytest.mark.parametrize("scaled", ["before", "after", "divided", "never"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turn", [(0, 1, 3, 2), (0, 2, 3, 1)])
def test_attention_becomes_one_node(
    scaled: str, masked: bool, turn: tuple[int, ...], tmp_path: Path
) -> None:
    b, h, t, s, d = 2, 3, 4, 5, 6
    shapes = {"q": (b, h, t, d), "k": (b, h, s, d), "v": (b, h, s, d), "m": (b, 1, 1, s)}
    if turn == (0, 2, 3, 1):
        shapes["k"] = (b, s, h, d)
    nodes = [node("Transpose", "k", "kt", perm=list(turn))]
    query, logits = "q", "l"
    if scaled == "before":
        nodes.append(node("Mul", "q scale", "qs"))
        query = "qs"
    nodes.append(node("MatMul", f"{query} kt", "l"))
    if scaled in ("after", "divided"):
        nodes.append(node("Mul" if scaled == "after" else "Div", "l scale", "ls"))
        logits = "ls"
    if masked:
        nodes.append(node("Add", f"m {logits}", "lm"))
        logits = "lm"
    nodes += [node("Softmax", logits, "p"), node("MatMul", "p v", "y")]
    if not masked:
        del shapes["m"]
    proto = model(nodes, shapes, {"scale": np.float32(0.4)})
    inputs = {name: normal(*shape) for name, shape in shapes.items()}
    graph = check(write(proto, tmp_path / "a.onnx"), inputs)
    assert [op for op in ops(graph) if op != "transpose"] == ["attention"]


def test_half_precision_weights_are_computed_in_fp32(tmp_path: Path) -> None:
    weight = normal(4, 6).astype(np.float16)
    nodes = [node("MatMul", "x w", "y")]
    proto = model(nodes, {"x": (3, 4)}, {"w": weight}, dtype=TensorProto.FLOAT16)
    graph = read_onnx(write(proto, tmp_path / "a.onnx"))
    x = normal(3, 4)
    close(graph, {"x": x}, [x @ weight.astype(np.float32)])


def test_weights_in_a_file_beside_are_read(tmp_path: Path) -> None:
    weight = normal(40, 50)
    proto = model([node("MatMul", "x w", "y")], {"x": (3, 40)}, {"w": weight})
    path = tmp_path / "a.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").is_file()
    close(read_onnx(path), {"x": normal(3, 40)}, oracle(path, {"x": normal(3, 40)}))


def test_a_graph_in_any_order_of_nodes_is_sorted(tmp_path: Path) -> None:
    nodes = [node("Relu", "b", "y"), node("Neg", "a", "b"), node("Exp", "x", "a")]
    path = write(model(nodes, {"x": (2, 3)}, {}), tmp_path / "a.onnx")
    graph = read_onnx(path)
    assert ops(graph) == ["exp", "neg", "relu"]
    x = normal(2, 3)
    close(graph, {"x": x}, [np.maximum(-np.exp(x), 0)])


def test_replaced_weights_are_in_the_file_that_is_written(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w b", "h", transB=1), node("Relu", "h", "y")]
    path = write(
        model(nodes, {"x": (3, 4)}, {"w": normal(5, 4), "b": normal(5)}), tmp_path / "a.onnx"
    )
    graph = read_onnx(path)
    weight = normal(5, 4, seed=1)
    changed: Graph = graph.with_constants({"w": weight})
    again = tmp_path / "b.onnx"
    write_onnx(changed, again)
    x = normal(3, 4)
    (got,) = oracle(again, {"x": x})
    np.testing.assert_allclose(got, np.maximum(x @ weight.T + normal(5), 0), **TOLERANCE)
    close(graph, {"x": x}, oracle(path, {"x": x}))
