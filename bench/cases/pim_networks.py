"""Seven networks for the benchmarks of Hamming rates: weights, inputs, and what is to be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from quernstone.bench.fidelity import Split, files, language, ocr, speech
from quernstone.importers import Graph, models
from quernstone.importers.file import read_tensors
from quernstone.pim.influence import influence
from quernstone.pim.network import Candidates, Compressed, calibrate
from quernstone.pim.report import Analysis, analyze

Batches = list[dict[str, Tensor]]
POINTS = tuple(float(snr) for snr in range(28, 52, 2))
"""dB, to choose a network's operating point from."""


@dataclass(frozen=True)
class Network:
    """A network, and the fidelity that it is compressed to."""

    name: str
    load: Callable[[], Graph]
    inputs: Callable[[Split], Batches]
    snr: float
    """dB, of the layers on calibration inputs: what `operating_point` takes of `points` with
    validation inputs."""
    unit: str
    what: str
    kept: Callable[[Graph, Graph, Split], float]
    """Of the network in the nearest integers and the compressed one; more is better."""
    least: float
    """Of `kept`, what is promised of held-out inputs."""
    whole: float
    """Of `kept`, where nothing has changed."""
    probes: int = 2
    """Batches of calibration inputs to measure the influence of layers with."""
    points: tuple[float, ...] = POINTS
    """dB, to choose `snr` from."""
    recorded: tuple[float, float, float, float] | None = None
    """HR of 8 bits, with shifts 8 and 16, and of 4 bits, as they were measured before."""
    quick: bool = False

    @property
    def wanted(self) -> float:
        """Of `kept`, on validation inputs: three quarters of the loss that is promised at most."""
        return self.least + (self.whole - self.least) / 4


def first_enough(points: Sequence[float], enough: Callable[[float], bool]) -> float | None:
    """The first of points that is enough, where all after it are; None where none is.

    Found by bisection.
    """
    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        if enough(points[middle]):
            high = middle
        else:
            low = middle + 1
    # All others have been looked at.
    if low == len(points) - 1 and not enough(points[low]):
        return None
    return points[low]


def _batches(inputs: dict[str, Tensor], size: int) -> Batches:
    count = len(next(iter(inputs.values())))
    return [{name: x[at : at + size] for name, x in inputs.items()} for at in range(0, count, size)]


def _sentences(split: Split) -> Batches:
    return _batches(language.encoded(split, 320 if split == "calibration" else 256), 32)


def _pages(split: Split) -> Batches:
    return [{"x": page.picture} for page in ocr.pages(split)]


def _lines(split: Split) -> Batches:
    return _batches({"x": ocr.lines(split).pictures}, 8)


def _turned(split: Split) -> Batches:
    return _batches({"x": ocr.turned(split)[0]}, 16)


def _files(split: Split) -> Batches:
    return _batches(files.inputs([content for _, content in files.files(split)]), 16)


def _sound(split: Split) -> Batches:
    return [speech.inputs(speech.scene(split).wave)]


def _windows(split: Split) -> Batches:
    ids, _ = language.windows(split, *((48, 128) if split == "calibration" else (4, 256)))
    return [{"input_ids": row[None]} for row in ids]


def _characters(base: Graph, changed: Graph, split: Split) -> float:
    alphabet = ocr.characters(NETWORKS["recogniser"].load())
    read = [ocr.character_accuracy(network, alphabet, split) for network in (base, changed)]
    return 100 * (read[1] - read[0])


def _bits(base: Graph, changed: Graph, split: Split) -> float:
    bits = [language.bits_per_byte(network, split) for network in (base, changed)]
    return 100 * (1 - bits[1] / bits[0])


_EVERY = (
    Network(
        "detector",
        load=functools.partial(models.pp_ocr, "detector"),
        inputs=_pages,
        snr=34.0,
        unit="IoU",
        what="boxes of text, mean overlap with those of int8",
        kept=ocr.box_overlap,
        least=0.95,
        whole=1.0,
        recorded=(0.494, 0.458, 0.441, 0.412),
    ),
    Network(
        "recogniser",
        load=functools.partial(models.pp_ocr, "recogniser"),
        inputs=_lines,
        snr=40.0,
        unit="points",
        what="characters of rendered text read, more than by int8",
        kept=_characters,
        least=-1.0,
        whole=0.0,
        recorded=(0.495, 0.461, 0.445, 0.429),
    ),
    Network(
        "classifier",
        load=functools.partial(models.pp_ocr, "classifier"),
        inputs=_turned,
        snr=32.0,
        unit="%",
        what="lines upright or not, decided as int8 does",
        kept=lambda *given: 100 * ocr.upright_agreement(*given),
        least=99.0,
        whole=100.0,
        recorded=(0.501, 0.489, 0.483, 0.469),
        quick=True,
    ),
    Network(
        "magika",
        load=models.magika,
        inputs=_files,
        snr=36.0,
        unit="%",
        what="kinds of files, decided as int8 does",
        kept=lambda *given: 100 * files.agreement(*given),
        least=99.0,
        whole=100.0,
        recorded=(0.509, 0.484, 0.461, 0.466),
    ),
    Network(
        "silero",
        load=models.silero_vad,
        inputs=_sound,
        snr=42.0,
        unit="%",
        what="frames of speech or not, decided as int8 does",
        kept=lambda *given: 100 * speech.agreement(*given),
        least=99.0,
        whole=100.0,
        recorded=(0.481, 0.441, 0.433, 0.379),
    ),
    Network(
        "minilm",
        load=models.minilm,
        inputs=_sentences,
        snr=34.0,
        unit="cosine",
        what="embeddings of sentences, mean cosine with those of int8",
        kept=lambda *given: float(language.cosines(*given).mean()),
        least=0.99,
        whole=1.0,
        recorded=(0.498, 0.474, 0.456, 0.443),
    ),
    Network(
        "smollm2",
        load=models.smollm2,
        inputs=_windows,
        snr=40.0,
        points=(36.0, 40.0, 44.0),
        probes=1,
        unit="%",
        what="bits saved for a byte of text, against int8",
        kept=_bits,
        least=-2.0,
        whole=0.0,
    ),
)
NETWORKS = {network.name: network for network in _EVERY}


@functools.cache
def tried(name: str) -> tuple[Candidates, dict[str, float]]:
    """Roundings of a network's layers, and how far the error of each layer goes.

    Both see calibration inputs alone.
    """
    of = NETWORKS[name]
    graph, batches = of.load(), of.inputs("calibration")
    candidates = Candidates(graph, calibrate(graph, batches))
    few = batches[:: -(-len(batches) // of.probes)]
    return candidates, influence(candidates.choose(28.0, fidelity="each"), few)


@functools.cache
def compressed(name: str, snr: float) -> Compressed:
    """A network at a fidelity in dB, its layers by their influence."""
    candidates, weights = tried(name)
    return candidates.choose(snr, sensitivity=weights)


class Chosen(NamedTuple):
    snr: float | None
    """dB, of the network's points; None where none of them is enough."""
    kept: dict[float, float]
    """What was kept of validation inputs at the points that were looked at."""


@functools.cache
def operating_point(name: str) -> Chosen:
    """The least fidelity at which validation inputs keep what is `wanted`; none other is seen."""
    of = NETWORKS[name]
    kept: dict[float, float] = {}

    def enough(snr: float) -> bool:
        found = compressed(name, snr)
        kept[snr] = of.kept(found.int8, found.network, "validation")
        return kept[snr] >= of.wanted

    return Chosen(first_enough(of.points, enough), kept)


@functools.cache
def table(name: str) -> Analysis:
    """The rates of a network's weights, as they were counted for the recorded ones.

    Of Silero VAD the weights come from the safetensors file of its package, transform of the
    signal included; those of its ONNX file differ by up to 0.006 in 4 bits.
    """
    if name == "silero":
        arrays, _ = read_tensors(models.package_file(models.SILERO, "silero_vad_16k.safetensors"))
        return analyze(arrays)
    return analyze(NETWORKS[name].load())


def deviation(name: str) -> float:
    """The largest distance from the recorded rates."""
    found, want = table(name), NETWORKS[name].recorded
    assert want is not None
    got: Sequence[float] = (
        found.hamming_rate, found.same_shift[8][0], found.same_shift[16][0], found.four_bits,
    )  # fmt: skip
    return max(abs(a - b) for a, b in zip(got, want, strict=True))
