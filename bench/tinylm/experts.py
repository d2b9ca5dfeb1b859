"""tinylm with experts: `python -m quernstone.bench.tinylm.experts` trains the two and traces them.

Routing of random weights says nothing about that of a model, so every study of caches, gating and
prefetching of experts runs on these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from quernstone.bench.tinylm import checkpoint
from quernstone.bench.tinylm.corpus import HELD_OUT, TRAIN, documentation
from quernstone.bench.tinylm.model import Config, TinyLm
from quernstone.bench.tinylm.train import Recipe, Trainer, evaluate, shifted, windows
from quernstone.moe import Trace
from quernstone.moe.routing import record_routing

CONFIGS = {
    "top2of16": Config(
        "vanilla", "moe", layers=4, channels=128, head_width=16, hidden=192, experts=16, top_k=2
    ),
    "top6of64": Config(
        "vanilla", "moe", layers=4, channels=128, head_width=16, hidden=52, experts=64, top_k=6
    ),
}
STEPS = 2400
CONTEXT = 256
TRACED_TOKENS = {"top2of16": 32768, "top6of64": 8192}
"""Tokens of the committed traces: as many as fit four megabytes with the routers' softmax."""


@dataclass(frozen=True, kw_only=True)
class MoeRecipe(Recipe):
    router_balance: float = 0.01
    """Factor on the load-balancing loss."""


class MoeTrainer(Trainer):
    def __init__(self, model: TinyLm, text: bytes, recipe: MoeRecipe) -> None:
        super().__init__(model, text, recipe)
        self._router_balance = recipe.router_balance

    def loss(self, step: int) -> tuple[Tensor, Tensor | None]:
        output = self.model(*self.batch(step))
        assert output.loss is not None
        assert output.router_balance is not None
        return output.loss + self._router_balance * output.router_balance, output.importance


def path_of(name: str) -> Path:
    """The weights of a model by its name in `CONFIGS`."""
    return checkpoint.FOLDER / f"moe-{name}.npz"


def trace_path_of(name: str) -> Path:
    return checkpoint.FOLDER / f"moe-{name}.trace.npz"


def load(name: str) -> TinyLm:
    """A trained model, in evaluation mode.

    Raises:
        ValueError: an unknown name; as `checkpoint.load`.
    """
    _check(name)
    return checkpoint.load(path_of(name)).model


def load_trace(name: str) -> Trace:
    """Decoding steps of a model on held-out text.

    Raises:
        ValueError: an unknown name; as `Trace.load`.
    """
    _check(name)
    return Trace.load(trace_path_of(name))


def batches(split: str, *, context: int = CONTEXT, batch: int = 1) -> Iterator[Tensor]:
    """Windows of a split [b, t], in the order of the text."""
    yield from windows(documentation().text(split), context).split(batch)


def run(model: TinyLm, labels: Tensor) -> None:
    """Has a model compute the bytes of windows."""
    model(shifted(labels))


def trace(model: TinyLm, tokens: int, meta: dict[str, Any]) -> Trace:
    """Decoding steps of the first windows of the held-out text."""
    first = (part for part in windows(documentation().text(HELD_OUT), CONTEXT).split(1))
    chosen = [next(first) for _ in range(tokens // CONTEXT)]
    return record_routing(model, chosen, lambda labels: run(model, labels), meta=meta)


def _check(name: str) -> None:
    if name not in CONFIGS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(CONFIGS)}")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the models; all if none.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Where trainings are kept to go on from.")] = Path(
        "out/tinylm"
    ),
    folder: Annotated[Path, typer.Option(help="Where weights and traces go.")] = checkpoint.FOLDER,
) -> None:
    """Trains the models, goes on where it was stopped, and writes weights and traces."""
    corpus = documentation()
    for name in names or [*CONFIGS]:
        _check(name)
        recipe = MoeRecipe(steps=steps, batch=8, context=CONTEXT, threads=threads)
        model = TinyLm(CONFIGS[name], seed=0)
        trainer = MoeTrainer(model, corpus.text(TRAIN), recipe)
        state = out / f"moe-{name}.pt"
        if state.is_file():
            trainer.load(state)
        print(f"{name}: {model.parameter_count():,} parameters, step {trainer.step} of {steps}")

        def say(loop: Any) -> None:
            if loop.step % 100 == 0:
                print(f"  {loop.step}: {loop.curve[-1][1]:.4f} nats", flush=True)

        trainer.run(state=state, save_every=100, each=say)
        found = evaluate(model, corpus.text(HELD_OUT), context=CONTEXT, threads=threads)
        meta = {
            "recipe": recipe.to_dict(),
            "seed": recipe.seed,
            "corpus": corpus.describe(),
            "command": f"python -m quernstone.bench.tinylm.experts {name} --steps {steps} "
            f"--threads {threads}",
            "bits_per_byte": found.bits_per_byte,
        }
        path = folder / path_of(name).name
        checkpoint.save(path, model, meta)
        print(f"{path.name}: {found.bits_per_byte:.4f} bits per byte, {path.stat().st_size} bytes")
        # Of the weights as they are written, rounded to bf16.
        written = checkpoint.load(path).model
        traced = folder / trace_path_of(name).name
        about = {"model": path.name, "text": "held-out", **meta}
        with torch.no_grad():
            trace(written, TRACED_TOKENS[name], about).save(traced)
        print(f"{traced.name}: {traced.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(typer.run(main))
