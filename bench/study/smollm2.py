"""A part of the study on SmolLM2-135M: fine-tune its attention weights, evaluate, analyse.

Axes: b batch, l layers, t tokens, h query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from quernstone.attention import sink_attention
from quernstone.attention.hf import probed
from quernstone.bench.study import analysis
from quernstone.bench.study.parts import Part, SmolRecipe
from quernstone.bench.tinylm.corpus import HELD_OUT, TRAIN, documentation
from quernstone.bench.tinylm.loop import Loop, mean_cv, same_bits

SAVE_EVERY = 20
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
# Windows for the ablations, which run many times.
ANALYSED = 4


class Lora(nn.Module):
    """A frozen linear layer and a trained update of low rank beside it.

    y = W x + (alpha / rank) B A x; B begins at zero, so that training begins at the model itself.
    Source: arXiv 2106.09685.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        down = torch.empty(rank, base.in_features)
        nn.init.normal_(down, std=base.in_features**-0.5, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, self.down), self.up)
        base: Tensor = self.base(x)
        return base + self.scale * low


def adapt(model: nn.Module, recipe: SmolRecipe) -> dict[str, nn.Parameter]:
    """Freezes the model, puts a `Lora` around its attention weights; gives what is trained."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model.requires_grad_(False)
    trained = {}
    for name, module in list(model.named_modules()):
        for child in ADAPTED:
            base = getattr(module, child, None)
            if isinstance(base, nn.Linear):
                lora = Lora(base, recipe.rank, recipe.alpha, generator)
                setattr(module, child, lora)
                trained[f"{name}.{child}.down"] = lora.down
                trained[f"{name}.{child}.up"] = lora.up
    return trained


class Tuner(Loop):
    """Fine-tunes a causal model of transformers, whose attention is ours, on one window a step."""

    def __init__(self, model: nn.Module, tokens: Tensor, recipe: SmolRecipe) -> None:
        if len(tokens) < recipe.tokens:
            raise ValueError(f"tokens: got {len(tokens)}, expected {recipe.tokens} or more")
        trained = adapt(model, recipe)
        super().__init__(recipe, trained, decayed=0.0, betas=(0.9, 0.999), log_every=10)
        self.model, self.recipe = model, recipe
        self._tokens = tokens

    def window(self, step: int) -> Tensor:
        """[1, t] tokens of a step."""
        recipe = self.recipe
        random = np.random.default_rng((recipe.seed, step))
        first = int(random.integers(0, len(self._tokens) - recipe.tokens + 1))
        return self._tokens[None, first : first + recipe.tokens]

    def loss(self, step: int) -> tuple[Tensor, Tensor]:
        return _with_importance(self.model, self.window(step))


def _with_importance(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and importance [l, h] of [b, t] tokens."""
    found: list[Tensor] = []

    def probe(_module: nn.Module, qkv: Any, options: dict[str, Any], _mask: Any) -> Tensor:
        out, aux = sink_attention(*qkv, **options, return_aux=True)
        found.append(aux.importance)
        return out

    with probed(model, probe):
        loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss, torch.stack(found)


def run(part: Part, folder: Path) -> dict[str, Any]:
    """Fine-tunes (none for zero steps), and gives everything that summary and figures need.

    Raises:
        ImportError: the model's package or transformers is missing; with the command to get it.
    """
    from quernstone.attention.models import load_smollm2

    recipe = SmolRecipe.from_dict(part.setting["recipe"])
    model, tokenizer = load_smollm2()
    curve: list[list[float]] = []
    if recipe.steps:
        tuner = Tuner(model, tokens_of(tokenizer, TRAIN), recipe)
        state = folder / f"{part.file}.pt"
        if state.exists():
            tuner.load(state)
        tuner.run(state=state, save_every=SAVE_EVERY)
        curve = tuner.curve
    return {**measure(model, tokenizer, recipe), "curve": curve}


def tokens_of(tokenizer: Any, split: str) -> Tensor:
    """All tokens [t] of a split of the documentation, no special ones."""
    text = documentation().text(split).decode()
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def measure(model: nn.Module, tokenizer: Any, recipe: SmolRecipe) -> dict[str, Any]:
    """Held-out bits per byte, importance, gates, heads and value drain."""
    tokens = tokens_of(tokenizer, HELD_OUT)
    whole = len(tokens) // recipe.tokens
    windows = tokens[: whole * recipe.tokens].view(whole, recipe.tokens)
    windows = windows[:: max(1, whole // recipe.held_out_windows)][: recipe.held_out_windows]
    size = _byte_lengths(tokenizer)
    nats, bytes_read, importances = 0.0, 0, []
    with same_bits(recipe.threads), torch.no_grad():
        for window in windows[:, None]:
            loss, importance = _with_importance(model, window)
            nats += loss.item() * (recipe.tokens - 1)
            bytes_read += sum(map(size, window[0, 1:].tolist()))
            importances.append(importance.double())
        few = windows[:: max(1, len(windows) // ANALYSED)][:ANALYSED]
        batch = {"input_ids": few, "labels": few}
        gates = analysis.gate_histogram(model, batch)
        heads = analysis.heads(model, batch, recipe.seed)
        drain = analysis.value_drain(model, batch)
    importance = torch.stack(importances).mean(0)
    return {
        "bits_per_byte": nats / math.log(2) / bytes_read,
        "held_out_bytes": bytes_read,
        "cv": mean_cv(importance),
        "gate": importance.mean().item(),
        "importance": [[round(x, 6) for x in row] for row in importance.tolist()],
        "gates": gates,
        "heads": heads,
        "drain": drain,
    }


def _byte_lengths(tokenizer: Any) -> Callable[[int], int]:
    """Bytes that a token stands for: a byte-level vocabulary spells each byte as one character."""

    def length(token: int) -> int:
        return len(tokenizer.convert_ids_to_tokens(token))

    return length
