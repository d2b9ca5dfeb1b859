"""The networks that come as packages give what onnxruntime and transformers make of them."""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quernstone.importers import Graph, models, write_onnx
from tests.importers.tiny import close, oracle


def _installed(package: str) -> pytest.MarkDecorator:
    missing = not any(metadata.distributions(name=package))
    return pytest.mark.skipif(missing, reason=f"pip install --no-deps {package}")


def _pictures(*shape: int) -> dict[str, Any]:
    return {"x": np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)}


@pytest.mark.parametrize(
    ("part", "shape", "layers", "file"),
    [
        ("detector", (2, 3, 96, 160), {"conv": 62, "conv_transpose": 2}, "det"),
        ("recogniser", (2, 3, 48, 120), {"conv": 38, "linear": 9}, "rec"),
        ("classifier", (2, 3, 48, 192), {"conv": 53, "linear": 1}, "cls"),
    ],
)
@_installed(models.PP_OCR)
def test_pp_ocr_is_what_onnxruntime_runs(
    part: str, shape: tuple[int, ...], layers: dict[str, int], file: str, tmp_path: Path
) -> None:
    graph = models.pp_ocr(part)
    path = models.package_file(models.PP_OCR, models.OCR_FILES[part])
    assert file in path.name
    _same(graph, path, _pictures(*shape), tmp_path)
    found = [node.op for node in graph.layers()]
    assert {op: found.count(op) for op in set(found)} == layers
    # Nothing is left of batch normalisation and of the activations that the file spells out.
    assert not {"clip", "div", "pow", "sqrt"} & {node.op for node in graph.nodes}


@_installed(models.PP_OCR)
def test_the_recogniser_has_attention_and_its_alphabet() -> None:
    graph = models.pp_ocr("recogniser")
    found = [node.op for node in graph.nodes]
    assert found.count("attention") == 2
    assert found.count("layer_norm") == 5
    assert len(graph.metadata["character"].split("\n")) + 2 == 6625


@_installed(models.MAGIKA)
def test_magika_is_what_onnxruntime_runs(tmp_path: Path) -> None:
    inputs = {"bytes": np.random.default_rng(0).integers(0, 257, (3, 2048)).astype(np.int32)}
    path = models.package_file(models.MAGIKA, "model.onnx")
    _same(models.magika(), path, inputs, tmp_path)


@_installed(models.SILERO)
def test_silero_vad_is_what_onnxruntime_runs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"input": (9, 576), "h": (1, 1, 128), "c": (1, 1, 128)}
    inputs = {n: random.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}
    path = models.package_file(models.SILERO, "silero_vad_16k_sequence.onnx")
    _same(models.silero_vad(), path, inputs, tmp_path)


def _same(graph: Graph, path: Path, inputs: dict[str, Any], folder: Path) -> None:
    """As read, for these shapes alone, and written again."""
    want = oracle(path, inputs)
    close(graph, inputs, want)
    fixed = graph.specialised({name: array.shape for name, array in inputs.items()})
    assert not {"shape", "fill"} & {node.op for node in fixed.nodes}
    close(fixed, inputs, want)
    write_onnx(graph, folder / "again.onnx")
    for got, expected in zip(oracle(folder / "again.onnx", inputs), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@_installed(models.MINILM)
def test_minilm_is_what_transformers_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from quernstone.attention.models import load_minilm

    tokenizer = models.minilm_tokenizer()
    tokenizer.no_padding()
    ids = torch.tensor([tokenizer.encode("A cat is asleep on the warm sofa.").ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    graph = models.minilm()
    model, _ = load_minilm("eager")
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
    close(graph, inputs, [want])  # type: ignore[arg-type,list-item]
    write_onnx(graph, tmp_path / "a.onnx")
    (got,) = oracle(tmp_path / "a.onnx", {name: x.numpy() for name, x in inputs.items()})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@_installed(models.SMOLLM2)
def test_smollm2_is_what_transformers_runs() -> None:
    pytest.importorskip("transformers")
    from quernstone.attention.models import load_smollm2, real_text

    ids = torch.tensor([models.smollm2_tokenizer().encode(real_text(200)).ids])
    model, _ = load_smollm2("eager")
    with torch.no_grad():
        want = model(input_ids=ids).logits
    got = models.smollm2().run({"input_ids": ids})["logits"]
    # Logits are up to 40, after 30 layers.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("load", "package"),
    [
        (lambda: models.pp_ocr("detector"), models.PP_OCR),
        (models.magika, models.MAGIKA),
        (models.silero_vad, models.SILERO),
        (models.minilm, models.MINILM),
        (models.smollm2, models.SMOLLM2),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    load: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", nothing)
    with pytest.raises(ImportError, match=f"pip install --no-deps {package}$"):
        load()


def test_another_part_of_pp_ocr_is_refused() -> None:
    with pytest.raises(ValueError, match="part: got 'reader', expected one of detector, recog"):
        models.pp_ocr("reader")
