"""The committed models, measured again on a part of the held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quernstone.bench.study import analysis
from quernstone.bench.study.export import name_of
from quernstone.bench.tinylm import checkpoint
from quernstone.bench.tinylm.corpus import HELD_OUT, documentation
from quernstone.bench.tinylm.loop import same_bits
from quernstone.bench.tinylm.train import as_text, evaluate, shifted, windows

THREADS = 1
# Every eighth window: the text is sorted by document, so this is a little of each.
EVERY = 8


@dataclass(frozen=True)
class Quick:
    """A trained model on about 19 kB of text that it has not seen."""

    bits_per_byte: float
    cv: float
    gate: float
    heads: dict[str, Any]
    meta: dict[str, Any]
    other_text: str | None
    """A warning where this Python's documentation is not what the model was trained on."""


def measure(kind: str, loss: str, folder: Path = checkpoint.FOLDER) -> Quick:
    """Evaluates the committed model of a kind, trained "plain" or with the loss ("balance").

    Raises:
        FileNotFoundError: the checkpoint is not here.
        BadCheckpoint: it is damaged.
    """
    found = checkpoint.load(folder / name_of(kind, loss))
    corpus = documentation()
    context = found.meta["recipe"]["context"]
    labels = windows(corpus.text(HELD_OUT), context)[::EVERY]
    result = evaluate(found.model, as_text(labels), context=context, threads=THREADS)
    batch = {"input_ids": shifted(labels), "labels": labels}
    with same_bits(THREADS):
        heads = analysis.heads(found.model, batch, found.meta["seed"], shares=())
    other = found.meta["corpus"]
    warning = None
    if other["sha256"] != corpus.sha256:
        warning = (
            f"trained on the documentation of Python {other['python']} ({other['sha256'][:12]}), "
            f"measured on that of {corpus.describe()['python']} ({corpus.sha256[:12]}): some of "
            "the text may have been learnt"
        )
    return Quick(result.bits_per_byte, result.cv, result.gate, heads, found.meta, warning)
