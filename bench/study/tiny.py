"""A part of the study on tinylm: train (from scratch or from another part), evaluate, analyse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from quernstone.bench.study import analysis
from quernstone.bench.study.parts import Part
from quernstone.bench.tinylm.corpus import HELD_OUT, TRAIN, documentation
from quernstone.bench.tinylm.loop import same_bits
from quernstone.bench.tinylm.model import Config, TinyLm
from quernstone.bench.tinylm.train import Recipe, Trainer, evaluate, shifted, windows

SAVE_EVERY = 50
# Windows of the held-out text that gates and ablations are measured on.
ANALYSED = 48


def train(part: Part, parts: dict[str, Part], folder: Path) -> Trainer:
    """The finished trainer of a part; goes on from its last state in `folder` where there is one.

    A part that starts from another one trains that first, unless its weights lie in `folder`.
    """
    recipe = Recipe.from_dict(part.setting["recipe"])
    model = TinyLm(Config(**part.setting["config"]), seed=recipe.seed)
    state = folder / f"{part.file}.pt"
    trainer = Trainer(model, documentation().text(TRAIN), recipe)
    if state.exists():
        trainer.load(state)
    elif part.after is not None:
        model.load_state_dict(train(parts[part.after], parts, folder).model.state_dict())
    trainer.run(state=state, save_every=SAVE_EVERY)
    return trainer


def run(part: Part, parts: dict[str, Part], folder: Path) -> dict[str, Any]:
    """Trains, and gives everything that the summary and the figures need of this part."""
    trainer = train(part, parts, folder)
    recipe = trainer.recipe
    return {
        **measure(trainer.model, recipe.context, recipe.threads, recipe.seed),
        "parameters": trainer.model.parameter_count(),
        "trained_bytes": recipe.steps * recipe.batch * recipe.context,
        "curve": trainer.curve,
    }


def measure(model: TinyLm, context: int, threads: int, seed: int) -> dict[str, Any]:
    """Held-out bits per byte, importance, gates and heads of a trained model."""
    text = documentation().text(HELD_OUT)
    found = evaluate(model, text, context=context, threads=threads)
    labels = windows(text, context)
    # Spread over the whole text: its beginning is a few documents.
    labels = labels[:: max(1, math.ceil(len(labels) / ANALYSED))]
    batch = {"input_ids": shifted(labels), "labels": labels}
    with same_bits(threads), torch.no_grad():
        gates = analysis.gate_histogram(model, batch)
        heads = analysis.heads(model, batch, seed)
    return {
        "bits_per_byte": found.bits_per_byte,
        "held_out_bytes": found.bytes,
        "cv": found.cv,
        "gate": found.gate,
        "importance": [[round(x, 6) for x in row] for row in found.importance],
        "gates": gates,
        "heads": heads,
    }
