"""Reading: rendered lines and pages of text, and what the networks of PP-OCR make of them.

Text is drawn in the fonts that matplotlib brings, so every machine draws the same. Pre- and
post-processing follow the papers of the networks, in numpy: greedy CTC decoding of the recogniser
(Graves et al., ICML 2006), boxes from the probability map of the detector as in "Real-time scene
text detection with differentiable binarization" (arXiv 1911.08947) for upright text.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quernstone.bench.fidelity.common import Network, Split, run, seed, words
from quernstone.importers import Graph

HEIGHT = 48
LINE_WIDTH, UPRIGHT_WIDTH = 480, 192
PAGE = 480
# Of DB: a pixel is text above the first, a box above the second; boxes grow by area / perimeter
# times the ratio.
_PIXEL, _BOX, _GROW = 0.3, 0.5, 1.6
_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")

Boxes = NDArray[np.float64]
"""[n, 4]: left, top, right, bottom in pixels."""


class Lines(NamedTuple):
    """Lines of text as pictures of one size."""

    texts: tuple[str, ...]
    pictures: Tensor
    """[n, 3, 48, width], -1 black to 1 white."""


class Page(NamedTuple):
    picture: Tensor
    """[1, 3, page, page]."""
    boxes: Boxes
    """Where lines of text are."""


# Recogniser ---------------------------------------------------------------------------------------


@functools.cache
def lines(split: Split, count: int = 64, width: int = LINE_WIDTH) -> Lines:
    """Lines of documentation in several fonts, sizes and greys, with noise."""
    random = np.random.default_rng(seed(split, 73))
    texts = _pieces(split, count, 12, 30, random)
    return Lines(texts, torch.stack([_line(text, width, random) for text in texts]))


def characters(recogniser: Graph) -> tuple[str, ...]:
    """What the classes of the recogniser stand for; the blank is empty."""
    return ("", *recogniser.metadata["character"].split("\n"), " ")


def decode(probabilities: Tensor, alphabet: tuple[str, ...]) -> list[str]:
    """Greedy CTC: the best class of each step [b, t, classes], repeats as one, without blanks."""
    texts = []
    for classes in probabilities.argmax(-1).tolist():
        kept = [c for i, c in enumerate(classes) if i == 0 or c != classes[i - 1]]
        # The margin to the right of a line reads as a space.
        texts.append("".join(alphabet[c] for c in kept).rstrip())
    return texts


def read(network: Network, alphabet: tuple[str, ...], split: Split = "held-out") -> list[str]:
    """What the recogniser reads in `lines`."""
    return decode(_classes(network, lines(split).pictures), alphabet)


def character_accuracy(
    network: Network, alphabet: tuple[str, ...], split: Split = "held-out"
) -> float:
    """1 - edits / characters, over all lines: edits turn what is read into what was written."""
    texts = lines(split).texts
    edits = sum(
        edit_distance(got, want)
        for got, want in zip(read(network, alphabet, split), texts, strict=True)
    )
    return 1 - edits / sum(map(len, texts))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one string into the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _classes(network: Network, pictures: Tensor) -> Tensor:
    """What a network says of pictures, a few at a time: what is computed stays in the cache."""
    parts = [next(iter(run(network, {"x": part}).values())) for part in pictures.split(4)]
    return torch.cat(parts)


# Classifier ---------------------------------------------------------------------------------------


def turned(split: Split) -> tuple[Tensor, NDArray[np.bool_]]:
    """Lines [n, 3, 48, 192] of which every other stands on its head, and which do."""
    pictures = lines(split, 256, UPRIGHT_WIDTH).pictures.clone()
    down = np.arange(len(pictures)) % 2 == 1
    pictures[down] = pictures[down].flip(-1, -2)
    return pictures, down


def upside_down(network: Network, split: Split = "held-out") -> NDArray[np.bool_]:
    """For each of `turned`, whether the classifier says that it stands on its head."""
    found: NDArray[np.bool_] = _classes(network, turned(split)[0]).argmax(-1).numpy() == 1
    return found


def upright_agreement(base: Network, changed: Network, split: Split = "held-out") -> float:
    """The share of `turned` on which both networks decide alike."""
    return float((upside_down(base, split) == upside_down(changed, split)).mean())


# Detector -----------------------------------------------------------------------------------------


@functools.cache
def pages(split: Split, count: int = 6) -> tuple[Page, ...]:
    """Pages with lines of several sizes."""
    random = np.random.default_rng(seed(split, 79))
    return tuple(_page(split, random) for _ in range(count))


def find(network: Network, picture: Tensor) -> Boxes:
    """The boxes of text in a page."""
    (out,) = run(network, {"x": picture}).values()
    probability = out[0, 0].numpy()
    found = []
    for region in _regions(probability > _PIXEL):
        if probability[tuple(region.T)].mean() < _BOX:
            continue
        (top, left), (bottom, right) = region.min(0), region.max(0) + 1
        w, h = right - left, bottom - top
        if min(w, h) < 3:
            continue
        grow = _GROW * w * h / (2 * (w + h))
        found.append((left - grow, top - grow, right + grow, bottom + grow))
    limits = np.array([[0.0, 0.0], picture.shape[:-3:-1]])
    boxes = np.array(found, np.float64).reshape(-1, 2, 2)
    return boxes.clip(limits[0], limits[1]).reshape(-1, 4)


def box_overlap(base: Network, changed: Network, split: Split = "held-out") -> float:
    """Mean intersection over union of the boxes of two networks, see `overlap`, over pages."""
    return float(
        np.mean([overlap(*(find(n, p.picture) for n in (base, changed))) for p in pages(split)])
    )


def found_share(network: Network, split: Split = "held-out") -> float:
    """The share of lines that a detector puts a box around, with half of both in common."""
    hits = []
    for page in pages(split):
        found = find(network, page.picture)
        hits += [_unions(page.boxes, found).max(1, initial=0) >= 0.5]
    return float(np.concatenate(hits).mean())


def overlap(a: Boxes, b: Boxes) -> float:
    """Mean intersection over union of boxes that belong together; one that has no partner counts 0.

    The pair with the greatest overlap is taken first. No boxes on both sides are 1.
    """
    unions = _unions(a, b)
    total = 0.0
    for _ in range(min(unions.shape)):
        i, j = np.unravel_index(unions.argmax(), unions.shape)
        total += unions[i, j]
        unions[i, :] = unions[:, j] = -1
        if unions.max() <= 0:
            break
    return total / max(*unions.shape) if max(unions.shape) else 1.0


def _unions(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union, [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    union = sizes[0][:, None] + sizes[1][None] - both
    return both / np.where(union > 0, union, 1)


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The connected regions of a mask as pixels [n, 2]; neighbours share an edge or a corner."""
    left = set(zip(*(axis.tolist() for axis in mask.nonzero()), strict=True))
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    regions = []
    while left:
        edge = [left.pop()]
        region = list(edge)
        while edge:
            y, x = edge.pop()
            near = [(y + i, x + j) for i, j in around if (y + i, x + j) in left]
            left.difference_update(near)
            region += near
            edge += near
        regions.append(np.array(region))
    return regions


# Pictures -----------------------------------------------------------------------------------------


@functools.cache
def _font(name: str, size: int) -> object:
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    basic = ImageFont.Layout.BASIC
    return ImageFont.truetype(str(folder / name), size, layout_engine=basic)


def _pieces(
    split: Split, count: int, shortest: int, longest: int, random: np.random.Generator
) -> tuple[str, ...]:
    """Runs of whole words of this many characters."""
    text = words(split)
    pieces: list[str] = []
    while len(pieces) < count:
        at, wanted = int(random.integers(len(text) - 40)), int(random.integers(shortest, longest))
        piece = ""
        while len(piece) < shortest or len(f"{piece} {text[at]}") <= wanted:
            piece = f"{piece} {text[at]}".strip()
            at += 1
        if len(piece) <= longest and piece.isascii():
            pieces.append(piece)
    return tuple(pieces)


def _ink(text: str, font: object, grey: float) -> NDArray[np.float64]:
    """A text on white, cut to its extent; 0 is black."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = map(int, font.getbbox(text))  # type: ignore[attr-defined]
    image = Image.new("L", (right - left, bottom - top), 255)
    ImageDraw.Draw(image).text((-left, -top), text, fill=int(255 * grey), font=font)
    return np.asarray(image, np.float64) / 255


def _line(text: str, width: int, random: np.random.Generator) -> Tensor:
    """A line as high as the picture allows, white to its right, with noise."""
    name = _FONTS[int(random.integers(len(_FONTS)))]
    height = HEIGHT - int(random.integers(8, 18))
    ink = _ink(text, _font(name, 40), random.uniform(0, 0.4))
    shape = (height, min(width - 8, round(ink.shape[1] * height / ink.shape[0])))
    scaled = functional.interpolate(
        torch.from_numpy(ink)[None, None], shape, mode="bilinear", antialias=True
    )[0, 0]
    picture = np.ones((HEIGHT, width))
    top = (HEIGHT - height) // 2
    picture[top : top + height, 4 : 4 + shape[1]] = scaled.numpy()
    return _pixels(picture, random)


def _page(split: Split, random: np.random.Generator) -> Page:
    picture = np.ones((PAGE, PAGE))
    boxes = []
    top = int(random.integers(10, 40))
    while top < PAGE - 50:
        size = int(random.integers(16, 34))
        name = _FONTS[int(random.integers(len(_FONTS)))]
        (text,) = _pieces(split, 1, 8, PAGE // size, random)
        ink = _ink(text, _font(name, size), random.uniform(0, 0.4))[:, : PAGE - 20]
        left = int(random.integers(5, PAGE - ink.shape[1] - 4))
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        picture[top:bottom, left:right] = ink[: PAGE - top]
        boxes.append((left, top, right, bottom))
        top = bottom + int(random.integers(14, 60))
    return Page(_pixels(picture, random)[None], np.array(boxes, np.float64))


def _pixels(picture: NDArray[np.float64], random: np.random.Generator) -> Tensor:
    noisy = (picture + 0.02 * random.normal(size=picture.shape)).clip(0, 1)
    # To the steps of a file of pixels.
    grey = torch.from_numpy(np.round(noisy * 255) / 255 * 2 - 1).float()
    return grey.expand(3, -1, -1).contiguous()
