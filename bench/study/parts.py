"""The parts of the study: what each one trains, and with which setting.

A part is on record when a row has its name, its setting and the same text. A change of the code
that changes results raises `REVISION`, so that every part is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quernstone.bench.tinylm.loop import Balance, Schedule
from quernstone.bench.tinylm.model import Config
from quernstone.bench.tinylm.train import Recipe

REVISION = 1

KINDS = ("vanilla", "sink", "gated")
SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = (0, 1, 2)
STEPS = 1000
FINE_STEPS = 300
FINE_RATE = 1e-3
SMOL_STEPS = 200
BALANCE = Balance()
# One change each from `BALANCE`, on one kind.
OPTIONS_KIND = "gated"
OPTIONS = {
    "weight-0.001": Balance(weight=1e-3),
    "weight-0.1": Balance(weight=1e-1),
    "shared-2": Balance(shared=2),
    "skip-first-layer": Balance(skip_layers=1),
    "correction-1": Balance(correction=1),
}
# From a model that was trained without the loss.
FINE_KIND = "sink"
FINE = {"plain": None, "balance": Balance(), "shared": Balance(shared=2)}


@dataclass(frozen=True, kw_only=True)
class SmolRecipe(Schedule):
    """Fine-tuning of SmolLM2-135M by low-rank updates of its attention weights.

    Rank 16 and the weight of the loss are those of the predecessor of arXiv 2602.01203, the rest
    is ours.
    """

    tokens: int = 512
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 2e-4
    warmup: int = 10
    threads: int = 2
    held_out_windows: int = 24


@dataclass(frozen=True)
class Part:
    """`name` is a path of words; `model` is "tinylm" or "smollm2"."""

    name: str
    model: str
    setting: dict[str, Any] = field(hash=False)
    after: str | None = None
    """The part whose weights this one starts from."""

    @property
    def file(self) -> str:
        return self.name.replace("/", "-")


def plan() -> list[Part]:
    """Every part in the order in which they run: seeds outermost, so that early rows compare."""
    parts = []
    for seed in SEEDS:
        for kind in KINDS:
            parts.append(tiny(f"{kind}/plain/seed{seed}", kind, None, seed))
            parts.append(tiny(f"{kind}/balance/seed{seed}", kind, BALANCE, seed))
    for seed in FEW_SEEDS:
        for name, balance in FINE.items():
            parts.append(fine(f"finetune/{name}/seed{seed}", balance, seed))
    for seed in FEW_SEEDS:
        for name, balance in OPTIONS.items():
            parts.append(tiny(f"options/{name}/seed{seed}", OPTIONS_KIND, balance, seed))
    parts.append(smol("before", SmolRecipe(steps=0)))
    parts += [
        smol(f"finetune/{name}", SmolRecipe(steps=SMOL_STEPS, balance=b))
        for name, b in FINE.items()
    ]
    return parts


def tiny(name: str, kind: str, balance: Balance | None, seed: int) -> Part:
    """Training from scratch; weights and batches depend on `seed` alone, so that runs pair up."""
    recipe = Recipe(steps=STEPS, seed=seed, balance=balance)
    return Part(f"tinylm/{name}", "tinylm", _tiny_setting(kind, recipe, None))


def fine(name: str, balance: Balance | None, seed: int) -> Part:
    """Goes on from the model of the same seed that was trained without the loss."""
    start = f"tinylm/{FINE_KIND}/plain/seed{seed}"
    # Other batches than those of the first training.
    recipe = Recipe(steps=FINE_STEPS, seed=1000 + seed, balance=balance, learning_rate=FINE_RATE)
    return Part(f"tinylm/{name}", "tinylm", _tiny_setting(FINE_KIND, recipe, start), start)


def smol(name: str, recipe: SmolRecipe) -> Part:
    setting = {"recipe": recipe.to_dict(), "revision": REVISION}
    return Part(f"smollm2/{name}", "smollm2", setting)


def _tiny_setting(kind: str, recipe: Recipe, start: str | None) -> dict[str, Any]:
    return {
        "config": Config(mixer=kind).to_dict(),
        "recipe": recipe.to_dict(),
        "start": start,
        "revision": REVISION,
    }


def chosen(names: Sequence[str], parts: Sequence[Part] | None = None) -> list[Part]:
    """The parts whose name begins with one of `names`; all of them for none.

    Raises:
        ValueError: names what no part begins with.
    """
    parts = plan() if parts is None else parts
    strange = [n for n in names if not any(f"{p.name}/".startswith(f"{n}/") for p in parts)]
    if strange:
        raise ValueError(
            f"no part of the study begins with {', '.join(strange)}; the parts are "
            f"{', '.join(dict.fromkeys('/'.join(p.name.split('/')[:2]) for p in parts))}"
        )
    wanted = [p for p in parts if any(f"{p.name}/".startswith(f"{n}/") for n in names)]
    return wanted if names else list(parts)
