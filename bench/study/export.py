"""What travels with the package: the summary of the rows and a few trained models in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quernstone.bench.study import summary
from quernstone.bench.study.ledger import Ledger
from quernstone.bench.study.parts import KINDS, Part, plan
from quernstone.bench.tinylm import checkpoint
from quernstone.bench.tinylm.corpus import TRAIN, documentation
from quernstone.bench.tinylm.model import Config, TinyLm
from quernstone.bench.tinylm.train import Recipe, Trainer

LOSSES = ("plain", "balance")
SEED = 0


def name_of(kind: str, loss: str) -> str:
    """File of the checkpoint of a kind, trained with or without the loss."""
    return f"{kind}-{loss}.npz"


def export(ledger: Ledger, states: Path, bench: Path, say: Callable[[str], None]) -> None:
    """Writes recorded.json, and the checkpoints of the trainings whose last state is in `states`.

    Args:
        bench: the folder `bench` of a clone.
    """
    corpus = documentation()
    found = summary.summarise(ledger, corpus.sha256)
    summary.write(found, bench / "study" / summary.RECORDED.name)
    say(f"bench/study/{summary.RECORDED.name}: {found['parts'][0]} of {found['parts'][1]} parts")
    parts = {part.name: part for part in plan()}
    for kind in KINDS:
        for loss in LOSSES:
            part = parts[f"tinylm/{kind}/{loss}/seed{SEED}"]
            row = ledger.finished(part.name, part.setting, corpus.sha256)
            state = states / f"{part.file}.pt"
            if row is not None and state.exists():
                path = bench / "tinylm" / "checkpoints" / name_of(kind, loss)
                model = _finished(part, state)
                checkpoint.save(path, model, _meta(part, row))
                say(f"bench/tinylm/checkpoints/{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def _finished(part: Part, state: Path) -> TinyLm:
    recipe = Recipe.from_dict(part.setting["recipe"])
    model = TinyLm(Config(**part.setting["config"]), seed=recipe.seed)
    trainer = Trainer(model, documentation().text(TRAIN), recipe)
    trainer.load(state)
    if trainer.step != recipe.steps:
        raise ValueError(f"{state.name}: got step {trainer.step}, expected {recipe.steps}")
    return model


def _meta(part: Part, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": part.name,
        "command": f"python -m quernstone.bench.study {part.name}",
        "seed": part.setting["recipe"]["seed"],
        "recipe": part.setting["recipe"],
        "corpus": row["corpus"],
        "commit": row.get("commit"),
        "versions": row.get("versions"),
        "bits_per_byte": row["result"]["bits_per_byte"],
        "cv": row["result"]["cv"],
    }
