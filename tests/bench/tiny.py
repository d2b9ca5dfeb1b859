"""tinylm, smaller still, on a text of its own: what the tests train."""

from __future__ import annotations

import dataclasses

from quernstone.bench.study.parts import Part, fine, tiny
from quernstone.bench.tinylm.loop import Balance
from quernstone.bench.tinylm.model import Config, TinyLm
from quernstone.bench.tinylm.train import Recipe, Trainer

TEXT = ("".join(f"line {n} of {n * n % 97}, a text.\n" for n in range(200))).encode()
BALANCE = Balance(weight=0.1)


def config(mixer: str = "sink") -> Config:
    return Config(mixer=mixer, layers=2, channels=32, heads=4, hidden=32)


def recipe(steps: int = 6, balance: Balance | None = None, seed: int = 0) -> Recipe:
    return Recipe(steps=steps, seed=seed, balance=balance, batch=2, context=32, warmup=2)


def trainer(mixer: str = "sink", balance: Balance | None = None, steps: int = 6) -> Trainer:
    return Trainer(TinyLm(config(mixer)), TEXT, recipe(steps, balance))


def small(part: Part) -> Part:
    """The part with a model and a recipe that take a blink."""
    balance = Recipe.from_dict(part.setting["recipe"]).balance
    seed = part.setting["recipe"]["seed"]
    setting = {
        **part.setting,
        "config": config(part.setting["config"]["mixer"]).to_dict(),
        "recipe": recipe(4, balance, seed).to_dict(),
    }
    return dataclasses.replace(part, setting=setting)


def sink_parts() -> list[Part]:
    """With and without the loss, and a fine-tuning of the latter."""
    return [
        small(tiny("sink/plain/seed0", "sink", None, 0)),
        small(tiny("sink/balance/seed0", "sink", BALANCE, 0)),
        small(fine("finetune/balance/seed0", BALANCE, 0)),
    ]


def wide(part: Part) -> Part:
    """With the context of the study: fewer windows of a long text."""
    setting = {**part.setting, "recipe": {**part.setting["recipe"], "context": 256}}
    return dataclasses.replace(part, setting=setting)
