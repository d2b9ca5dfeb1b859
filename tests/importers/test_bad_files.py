"""Files that are broken, dangerous or not supported are refused, and the message says why."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quernstone.importers import read, read_llama_gguf, read_onnx, read_safetensors
from tests.importers.tiny import model, node, normal, write


def product(path: Path, weight: Any = None, **changes: Any) -> Path:
    """A file with one matrix, whose TensorProto is changed."""
    weight = normal(4, 6) if weight is None else weight
    proto = model([node("MatMul", "x w", "y")], {"x": (3, 4)}, {"w": weight})
    (tensor,) = proto.graph.initializer
    for name, value in changes.items():
        if name == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, name, value)
    return write(proto, path)


def test_a_truncated_file(tmp_path: Path) -> None:
    whole = product(tmp_path / "a.onnx").read_bytes()
    path = tmp_path / "b.onnx"
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"b\.onnx: not a whole ONNX file"):
            read_onnx(path)


def test_a_file_with_bytes_changed_is_read_or_refused(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c g g g g", "n"),
        node("MaxPool", "n", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", "p", "s"),
        node("Slice", "s i j", "k"),
        node("Concat", "k m", "t", axis=0),
        node("Reshape", "p t", "f"),
        node("Gemm", "f v", "y", transB=1),
    ]
    constants = {"w": normal(4, 3, 3, 3), "b": normal(4), "g": np.abs(normal(4))}
    constants |= {"i": np.array([0]), "j": np.array([1]), "m": np.array([-1]), "v": normal(5, 64)}
    whole = model(nodes, {"x": (2, 3, 8, 8)}, constants).SerializeToString()
    path, random, refused = tmp_path / "a.onnx", np.random.default_rng(0), 0
    for _ in range(200):
        changed = bytearray(whole)
        for at in random.integers(len(whole), size=3):
            changed[at] = random.integers(256)
        path.write_bytes(changed)
        try:
            read_onnx(path)
        except ValueError:
            refused += 1
    assert 20 < refused < 180


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    with pytest.raises(ValueError, match=r"a\.onnx: not a whole ONNX file"):
        read_onnx(path)


@pytest.mark.parametrize("reader", [read, read_onnx, read_safetensors, read_llama_gguf])
def test_a_file_that_is_not_there(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        reader(tmp_path / "none.onnx")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    weight = normal(4, 6)
    weight[1, 2] = bad
    message = rf"linear 'y': weight .*: 1 of 24 are {bad}, expected finite numbers"
    with pytest.raises(ValueError, match=message):
        read_onnx(product(tmp_path / "a.onnx", weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (4, 7)}, r"'w': got 96 bytes, expected 112 for \(4, 7\)"),
        ({"dims": (1 << 40, 1 << 20)}, "'w': got 96 bytes, expected 46116860184"),
        ({"dims": (-4, 6)}, "extents of 0 or more"),
        ({"data_type": TensorProto.STRING}, "type STRING, expected one of FLOAT"),
    ],
)
def test_weights_whose_shape_and_data_disagree(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_onnx(product(tmp_path / "a.onnx", **changes))


def _external(path: Path, **entries: str) -> Path:
    proto = onnx.load(product(path))
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return write(proto, path)


@pytest.mark.parametrize("location", ["../w.bin", "{folder}/w.bin", "inner/../../w.bin", ""])
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(96))
    (tmp_path / "model").mkdir()
    location = location.format(folder=tmp_path)
    path = _external(tmp_path / "model" / "a.onnx", location=location)
    with pytest.raises(ValueError, match="outside the model's folder"):
        read_onnx(path)


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(96))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").symlink_to(tmp_path / "w.bin")
    path = _external(tmp_path / "model" / "a.onnx", location="w.bin")
    with pytest.raises(ValueError, match="outside the model's folder"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "none.bin"}, "'none.bin', where no file is"),
        ({"location": "w.bin", "offset": "8"}, "got 88 bytes, expected 96"),
        ({"location": "w.bin", "offset": "-8"}, "are not there"),
        ({"location": "w.bin", "length": "4096"}, "4096 bytes at 0 of 'w.bin' are not there"),
        ({"location": "w.bin", "offset": "eight"}, "offset: got 'eight'"),
    ],
)
def test_external_data_that_is_not_there(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(96))
    with pytest.raises(ValueError, match=message):
        read_onnx(_external(tmp_path / "a.onnx", **entries))


def test_nodes_in_a_circle(tmp_path: Path) -> None:
    nodes = [node("Add", "x b", "a", name="one"), node("Relu", "a", "b", name="two")]
    path = write(model(nodes, {"x": (2, 3)}, {}, ("b",)), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"a\.onnx: nodes in a circle: '(one|two)' -> "):
        read_onnx(path)


def test_names_in_a_circle(tmp_path: Path) -> None:
    nodes = [node("Identity", "a", "b"), node("Identity", "b", "a"), node("Add", "x a", "y")]
    path = write(model(nodes, {"x": (2, 3)}, {}), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"nodes in a circle: 'a' is made from itself"):
        read_onnx(path)


def test_every_operator_that_is_not_supported_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [
        node("Selu", "x", "a", name="third"),
        node("Relu", "a", "b"),
        node("Mine", "b", "c", name="mine", domain="org.example"),
        node("MaxPool", "c", "y", name="same", kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, {})
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    message = (
        r"not supported: Selu \('third'\), org\.example\.Mine \('mine'\), "
        r"MaxPool \('same': auto_pad SAME_UPPER\)$"
    )
    with pytest.raises(ValueError, match=message):
        read_onnx(write(proto, tmp_path / "a.onnx"))


def test_branches_are_named(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [node("Relu", "x", "z")], "b", [], [helper.make_empty_tensor_value_info("z")]
    )
    nodes = [node("If", "c", "y", name="if", then_branch=branch, else_branch=branch)]
    path = write(model(nodes, {"x": (2,)}, {"c": np.array(True)}), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"not supported: If \('if'\)"):
        read_onnx(path)


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile"])
def test_a_constant_that_would_fill_the_memory(op: str, tmp_path: Path) -> None:
    huge = np.array([1 << 20, 1 << 20])
    names = "s" if op == "ConstantOfShape" else "o s"
    nodes = [node(op, names, "h"), node("Add", "x h", "y")]
    constants = {"s": huge, "o": np.ones((1, 1), np.float32)}
    path = write(model(nodes, {"x": (1, 1)}, constants), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"'h': a constant of shape .*, expected \d+ elements"):
        read_onnx(path)


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_is_too_old_or_too_new(opset: int, tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], {"x": (2,)}, {}, opset=17)
    proto.opset_import[0].version = opset
    with pytest.raises(ValueError, match=f"opset {opset}, expected 7 to "):
        read_onnx(write(proto, tmp_path / "a.onnx"))


def test_layers_whose_weights_disagree(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w b", "y", name="stem", group=2)]
    constants = {"w": normal(5, 2, 3, 3), "b": normal(5)}
    path = write(model(nodes, {"x": (1, 4, 8, 8)}, constants), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"conv 'stem': got weight .*expected outputs in 2 groups"):
        read_onnx(path)
    nodes = [node("Gemm", "x w b", "y", name="head")]
    constants = {"w": normal(4, 6), "b": normal(5)}
    path = write(model(nodes, {"x": (1, 4)}, constants), tmp_path / "b.onnx")
    with pytest.raises(ValueError, match=r"Gemm 'head': got bias \(5,\), matrix \(4, 6\)"):
        read_onnx(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ending in '.pt', expected .onnx, .safetensors, .gguf"):
        read(path)


def _safetensors(path: Path, metadata: dict[str, str] | None = None, cut: int = 0) -> Path:
    from safetensors.numpy import save

    data = save({"w": normal(2, 3)}, metadata)
    path.write_bytes(data[: len(data) - cut])
    return path


@pytest.mark.parametrize("cut", [1, 24, 40])
def test_a_truncated_safetensors_file(cut: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors: not a whole safetensors file"):
        read(_safetensors(tmp_path / "a.safetensors", cut=cut))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "weights alone, with no config.json beside them"),
        ({"quernstone.nodes": "{}"}, "quernstone.graph: got None, expected '1'"),
        ({"quernstone.nodes": "{}", "quernstone.graph": "2"}, "got '2', expected '1'"),
        ({"quernstone.nodes": "{", "quernstone.graph": "1"}, "Expecting property name"),
        ({"quernstone.nodes": "[]", "quernstone.graph": "1"}, "quernstone.nodes: "),
        ({"quernstone.nodes": "{}", "quernstone.graph": "1"}, "quernstone.nodes: 'nodes'"),
        ({"quernstone.nodes": '{"nodes": [[1]]}', "quernstone.graph": "1"}, "not enough values"),
    ],
)
def test_safetensors_that_hold_no_graph(
    metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
        read(_safetensors(tmp_path / "a.safetensors", metadata))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[", "config.json: "),
        ("[]", "config.json: got no object"),
        (json.dumps({"model_type": "gpt2"}), "model_type: got 'gpt2', expected one of bert, llama"),
        (json.dumps({"model_type": "bert"}), "config: hidden_size is missing"),
        (json.dumps({"model_type": "bert", "hidden_size": "8"}), "hidden_size is '8', expected a"),
        (json.dumps({"model_type": "llama", "hidden_size": 0}), "hidden_size is 0, expected a num"),
    ],
)
def test_a_config_that_says_nothing_of_use(config: str, message: str, tmp_path: Path) -> None:
    _safetensors(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("length", [3, 10, 40, 200])
def test_a_truncated_gguf_file(length: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("text", "x" * 100)
    writer.add_tensor("token_embd.weight", normal(8, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "b.gguf"
    path.write_bytes((tmp_path / "a.gguf").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"b\.gguf: "):
        read(path)


@pytest.mark.parametrize("count", [1 << 40, (1 << 63) - 1])
def test_a_gguf_file_that_claims_to_be_huge(count: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", count) + b"name")
    with pytest.raises(ValueError, match=r"a\.gguf: "):
        read(path)


def test_a_gguf_file_of_another_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma")
    writer.add_tensor("token_embd.weight", normal(8, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"a\.gguf: general.architecture: got 'gemma'"):
        read(tmp_path / "a.gguf")
