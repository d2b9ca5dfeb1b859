"""A file of quantised tensors comes back as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quernstone.quant import QTensor, Scheme, load, quantize, save


@pytest.fixture
def tensors() -> dict[str, QTensor]:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    return {
        "a.weight": quantize(x, Scheme(3, granularity="group", group=16, scale="bf16")),
        "b": quantize(x[0], Scheme(8, symmetric=False, granularity="tensor")),
    }


def test_tensors_come_back_bit_by_bit(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    save(tensors, tmp_path / "x.safetensors")
    found = load(tmp_path / "x.safetensors")
    assert list(found) == list(tensors)
    for name, want in tensors.items():
        got = found[name]
        assert (got.scheme, got.shape) == (want.scheme, want.shape)
        assert torch.equal(got.packed, want.packed)
        assert torch.equal(got.scales, want.scales)
        assert (got.zero_points is None) == (want.zero_points is None)
        assert torch.equal(got.dequantize(), want.dequantize())


def test_tensors_may_share_their_memory(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    """As tied weights do."""
    tied = tensors["b"]
    save({"head": tied, "embedding": tied}, tmp_path / "x.safetensors")
    for found in load(tmp_path / "x.safetensors").values():
        assert torch.equal(found.dequantize(), tied.dequantize())


def test_refuses_every_truncation(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(tensors, path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x.safetensors: not a whole safetensors file"):
            load(path)
        assert path.read_bytes() == whole[:length]


def rewrite(path: Path, **changes: object) -> None:
    """The file again with other metadata."""
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    save_file(load_file(path), path, {**metadata, **{k: str(v) for k, v in changes.items()}})


def test_names_another_version(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(tensors, path)
    rewrite(path, **{"quernstone.quant": 99})
    with pytest.raises(
        ValueError, match=r"x.safetensors: quernstone.quant: got '99', expected '1'"
    ):
        load(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"quernstone.quant: got None"):
        load(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "has no attribute"),
        ('{"a.weight": {}}', "'shape'"),
        ('{"c": {"shape": [1], "scheme": {}}}', "c.packed: got nothing"),
        ('{"b": {"shape": [-40], "scheme": {}}}', "b.shape"),
        ('{"b": {"shape": [40], "scheme": {"bits": 4}}}', "b.scheme: got fields"),
    ],
)
def test_names_what_is_wrong_with_an_index(
    tensors: dict[str, QTensor], tmp_path: Path, index: str, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    save(tensors, path)
    rewrite(path, **{"quernstone.tensors": index})
    with pytest.raises(ValueError, match="x.safetensors: .*" + message):
        load(path)


def test_names_a_part_too_many(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save({"b": tensors["b"]}, path)
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    save_file({**load_file(path), "stray": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"got \['stray'\] beside the tensors"):
        load(path)


def test_a_failed_save_leaves_the_old_file(tensors: dict[str, QTensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(tensors, path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"tensors\['c'\]: got Tensor, expected a QTensor"):
        save({**tensors, "c": torch.zeros(1)}, path)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="tensors: got the name 1, expected a string"):
        save({1: tensors["b"]}, path)  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_says_that_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load(tmp_path / "nothing.safetensors")
