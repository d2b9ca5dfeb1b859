"""Training and measuring tinylm: random windows of the text in, bits per byte out.

Axes: b batch, l layers, t tokens, h heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernstone.bench.tinylm.corpus import START
from quernstone.bench.tinylm.loop import Loop, Schedule, mean_cv, same_bits
from quernstone.bench.tinylm.model import TinyLm


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How a model is trained. Runs with one `seed` see the same batches in the same order."""

    batch: int = 8
    context: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    sink_rate: float = 10.0
    """Factor on the learning rate of the sinks. They compete with log-sum-exps of 5 and more, and
    a rate made for weights of 0.02 hardly takes them from 0 within a thousand steps."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


class Trainer(Loop):
    """Trains every weight of a model, in place, on bytes without `START`."""

    def __init__(self, model: TinyLm, text: bytes, recipe: Recipe) -> None:
        if len(text) < recipe.context:
            raise ValueError(f"text: got {len(text)} bytes, expected {recipe.context} or more")
        trained = dict(model.named_parameters())
        super().__init__(
            recipe,
            trained,
            decayed=recipe.weight_decay,
            betas=(0.9, 0.95),
            log_every=20,
            faster={".sinks": recipe.sink_rate},
        )
        self.model, self.recipe = model.train(), recipe
        self._text = as_tensor(text)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels [b, t] of a step: random windows, each behind a `START`."""
        recipe = self.recipe
        random = np.random.default_rng((recipe.seed, step))
        first = random.integers(0, len(self._text) - recipe.context + 1, recipe.batch)
        labels = torch.stack([self._text[i : i + recipe.context] for i in first.tolist()])
        return shifted(labels), labels

    def loss(self, step: int) -> tuple[Tensor, Tensor | None]:
        output = self.model(*self.batch(step))
        assert output.loss is not None
        return output.loss, output.importance


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a text that it did not learn."""

    bits_per_byte: float
    importance: list[list[float]]
    """[l][h] mean gate; empty without attention."""
    bytes: int

    @property
    def cv(self) -> float:
        return mean_cv(self.importance) if self.importance else math.nan

    @property
    def gate(self) -> float:
        return float(np.mean(self.importance)) if self.importance else math.nan


def evaluate(
    model: TinyLm, text: bytes, *, context: int = 256, batch: int = 16, threads: int = 1
) -> Evaluation:
    """Bits per byte and importance on consecutive windows; a rest below a window is left out.

    Raises:
        ValueError: the text is shorter than a window.
    """
    labels = windows(text, context)
    bits, importances = 0.0, []
    model.eval()
    with same_bits(threads), torch.no_grad():
        for part in labels.split(batch):
            output = model(shifted(part), part)
            assert output.loss is not None
            share = len(part) / len(labels)
            bits += float(output.loss) * share / math.log(2)
            if output.importance is not None:
                importances.append(output.importance.double() * share)
    importance = torch.stack(importances).sum(0).tolist() if importances else []
    return Evaluation(bits, importance, labels.numel())


def windows(text: bytes, context: int) -> Tensor:
    """[windows, t] bytes: the text cut into consecutive windows, without the rest.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(text) < context:
        raise ValueError(f"text: got {len(text)} bytes, expected {context} or more")
    whole = len(text) // context
    return as_tensor(text)[: whole * context].view(whole, context)


def shifted(labels: Tensor) -> Tensor:
    """The inputs [b, t] that predict the labels: `START`, then all bytes but the last."""
    start = torch.full_like(labels[:, :1], START)
    return torch.cat([start, labels[:, :-1]], dim=1)


def as_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))


def as_text(labels: Tensor) -> bytes:
    return labels.to(torch.uint8).numpy().tobytes()
