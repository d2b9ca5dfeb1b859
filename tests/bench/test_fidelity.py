"""The evaluations see what real networks do, and what becomes of them when weights are coarse."""

import itertools
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernstone.bench.fidelity import Split, files, language, layer_snr, ocr, speech
from quernstone.bench.fidelity.common import SPLITS, sentences, text
from quernstone.importers import Graph, Node, Value, models


def _installed(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if not any(metadata.distributions(name=name))]
    return pytest.mark.skipif(bool(missing), reason=f"pip install --no-deps {' '.join(packages)}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of the inputs of each split: a test needs no figure to the last percent."""
    lines, every = ocr.lines, files.files
    encoded, windows = language.encoded, language.windows

    def some(split: Split, count: int = 24, width: int = ocr.LINE_WIDTH) -> ocr.Lines:
        return lines(split, min(count, 64), width)

    monkeypatch.setattr(ocr, "lines", some)
    monkeypatch.setattr(files, "files", lambda split: every(split, 4))
    monkeypatch.setattr(language, "encoded", lambda split: encoded(split, 32))
    monkeypatch.setattr(language, "windows", lambda split: windows(split, 2))


def coarse(graph: Graph, levels: int) -> Graph:
    """The weights in steps of their greatest magnitude / levels, channel by channel."""
    changed = {}
    for layer in graph.layers():
        name = layer.input("weight") or ""
        weight = graph.constants[name]
        axes = tuple(range(1, weight.ndim))
        step = np.abs(weight).max(axes, keepdims=True) / levels
        changed[name] = np.round(weight / np.where(step > 0, step, 1)) * step
    return graph.with_constants(changed)


@_installed(models.PP_OCR)
def test_the_recogniser_reads_rendered_lines_and_int8_hardly_worse(fewer: None) -> None:
    graph = models.pp_ocr("recogniser")
    alphabet = ocr.characters(graph)
    whole = ocr.character_accuracy(graph, alphabet)
    assert whole > 0.97
    assert ocr.character_accuracy(coarse(graph, 127), alphabet) > whole - 0.02
    assert ocr.character_accuracy(coarse(graph, 5), alphabet) < whole - 0.1


@_installed(models.PP_OCR)
def test_the_classifier_knows_upside_down(fewer: None) -> None:
    graph = models.pp_ocr("classifier")
    _, down = ocr.turned("held-out")
    assert (ocr.upside_down(graph) == down).mean() > 0.97
    assert ocr.upright_agreement(graph, coarse(graph, 127)) >= 0.95
    assert ocr.upright_agreement(graph, graph) == 1
    assert ocr.upright_agreement(graph, coarse(graph, 2)) < 0.9


@_installed(models.PP_OCR)
def test_the_detector_finds_the_lines_of_a_page() -> None:
    graph = models.pp_ocr("detector")
    assert ocr.found_share(graph) > 0.9
    assert ocr.box_overlap(graph, graph) == 1
    assert 0.9 < ocr.box_overlap(graph, coarse(graph, 127)) <= 1
    assert ocr.box_overlap(graph, coarse(graph, 5)) < 0.8


@_installed(models.SILERO)
def test_synthesised_speech_is_heard_as_speech() -> None:
    graph = models.silero_vad()
    for split in SPLITS:
        wave, voiced = speech.scene(split)
        found = speech.probabilities(graph, wave)
        assert (found[voiced] >= speech.SPEECH).mean() > 0.9
        # A voice is thought to go on for some frames after it has ended.
        assert (found[~voiced] >= speech.SPEECH).mean() < 0.2
        assert speech.accuracy(graph, split) > 0.88
    assert speech.agreement(graph, graph) == 1
    assert speech.agreement(graph, coarse(graph, 127)) > 0.98
    assert speech.agreement(graph, coarse(graph, 2)) < 0.9


@_installed(models.MAGIKA)
def test_files_are_told_apart(fewer: None) -> None:
    graph = models.magika()
    assert len(files.files("held-out")) >= 100
    assert files.accuracy(graph) > 0.85
    assert files.agreement(graph, coarse(graph, 2)) < 0.95


@_installed(models.MINILM)
def test_embeddings_of_sentences_turn_with_coarse_weights(fewer: None) -> None:
    graph = models.minilm()
    fine = language.cosines(graph, coarse(graph, 127))
    assert fine.shape == (32,)
    assert 0.99 < fine.min() < 1
    assert language.cosines(graph, coarse(graph, 4)).mean() < 0.9


@_installed(models.SMOLLM2)
def test_smollm2_needs_a_bit_for_a_byte(fewer: None) -> None:
    graph = models.smollm2()
    whole = language.bits_per_byte(graph)
    # About what transformers needs on such text.
    assert 0.7 < whole < 1.1
    assert language.bits_per_byte(coarse(graph, 7)) > 1.05 * whole


def test_a_network_may_be_a_function() -> None:
    def louder(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"speech_probs": inputs["input"].abs().amax(-1).sigmoid()}

    assert speech.agreement(louder, louder) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_inputs_are_the_same_each_time(split: str) -> None:
    for make in (speech.scene, ocr.lines, ocr.pages, files.files):
        first = make(split)  # type: ignore[operator]
        make.cache_clear()  # type: ignore[attr-defined]
        assert content(first) == content(make(split))  # type: ignore[operator]


def content(value: Any) -> Any:
    """Tuples of bytes and strings."""
    if isinstance(value, tuple):
        return tuple(map(content, value))
    return np.asarray(value).tobytes() if isinstance(value, Tensor | np.ndarray) else value


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_the_splits_share_no_input(one: Split, other: Split) -> None:
    assert not set(sentences(one)) & set(sentences(other))
    assert text(one)[:2000] not in text(other)
    assert not set(ocr.lines(one).texts) & set(ocr.lines(other).texts)
    assert len(sentences(other)) >= 256
    assert len(files.files(other)) >= 200
    contents = [{content for _, content in files.files(split)} for split in (one, other)]
    assert not contents[0] & contents[1]
    waves = [speech.scene(split).wave[:16000] for split in (one, other)]
    assert abs(np.corrcoef(*waves)[0, 1]) < 0.2
    first = [ocr.pages(split)[0].picture for split in (one, other)]
    assert not torch.equal(*first)


@_installed(models.MINILM)
def test_sentences_come_from_all_over_a_split() -> None:
    few, many = (language.encoded("held-out", count) for count in (16, 256))
    assert [len(x["input_ids"]) for x in (few, many)] == [16, 256]
    assert len({tuple(row) for row in many["input_ids"].tolist()}) == 256


def test_edit_distance_counts_insertions_deletions_and_substitutions() -> None:
    assert ocr.edit_distance("kitten", "sitting") == 3
    assert ocr.edit_distance("", "abc") == ocr.edit_distance("abc", "") == 3
    assert ocr.edit_distance("flaw", "lawn") == 2
    assert ocr.edit_distance("same", "same") == 0


def test_ctc_drops_blanks_and_repeats() -> None:
    alphabet = ("", "a", "b", " ")
    steps = torch.eye(4)[torch.tensor([[1, 1, 0, 1, 2, 2, 3, 3, 0], [0, 0, 2, 0, 2, 1, 1, 1, 0]])]
    assert ocr.decode(steps, alphabet) == ["aab", "bba"]


def test_overlap_pairs_boxes_and_counts_those_without_a_partner() -> None:
    a = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float64)
    shifted = a + np.array([5, 0, 5, 0])
    assert ocr.overlap(a, a[::-1]) == 1
    assert ocr.overlap(a, shifted) == pytest.approx(1 / 3)
    assert ocr.overlap(a, a[:1]) == ocr.overlap(a[:1], a) == 0.5
    far = np.array([[0, 0, 10, 10], [90, 90, 99, 99]], np.float64)
    # A box has one partner, however many it overlaps.
    assert ocr.overlap(np.array([[0, 0, 10, 10], [1, 0, 11, 10]], np.float64), far) == 0.5
    assert ocr.overlap(a, np.zeros((0, 4))) == 0
    assert ocr.overlap(np.zeros((0, 4)), np.zeros((0, 4))) == 1


def test_boxes_are_found_where_a_map_is_bright() -> None:
    map_ = torch.zeros(1, 1, 40, 60)
    map_[..., 10:20, 5:45] = 0.9
    map_[..., 30:33, 50:53] = 0.35  # too faint as a whole
    map_[..., 20, 45] = 0.9  # touches the first at a corner
    (box,) = ocr.find(lambda _: {"y": map_}, torch.zeros(1, 3, 40, 60))
    # 41 x 11 pixels grow by 1.6 area / perimeter on each side.
    grow = 1.6 * 41 * 11 / (2 * (41 + 11))
    np.testing.assert_allclose(box, [max(0, 5 - grow), 10 - grow, 46 + grow, 21 + grow])


def test_the_error_of_a_layer_is_its_own() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("v", "w")}
    graph = Graph(
        (
            Node("first", "linear", ("x", "v"), ("h",)),
            Node("bend", "relu", ("h",), ("r",)),
            Node("second", "linear", ("r", "w"), ("y",)),
        ),
        (Value("x", "float32", (None, 8)),),
        ("y",),
        weights,
    )
    noise = 0.01 * rng.normal(size=(8, 8)).astype(np.float32)
    x = [{"x": torch.from_numpy(rng.normal(size=(n, 8)).astype(np.float32))} for n in (50, 30)]
    changed = graph.with_constants({"v": weights["v"] + noise})
    found = layer_snr(graph, changed, x)
    rows = np.concatenate([batch["x"].numpy() for batch in x]).astype(np.float64)
    signal, wrong = ((rows @ m.T) ** 2 for m in (weights["v"], noise))
    assert found["first"] == pytest.approx(10 * np.log10(signal.sum() / wrong.sum()), abs=0.01)
    # Its inputs are those of the base.
    assert found["second"] == np.inf
