"""Weights for the Hamming regulariser, and MiniLM's fine-tuning without labels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from quernstone.bench.cases.pim_networks import first_enough
from quernstone.bench.fidelity import Split, common, language
from quernstone.importers import Graph
from quernstone.importers.models import minilm, minilm_tokenizer
from quernstone.importers.module import GraphModule
from quernstone.pim import FitReport, fit, reference_lhr, symmetric_scales

WEIGHTS = 25_000_000
"""As many as a ResNet-50 has."""


@dataclass(frozen=True)
class SpeedCase:
    """A layer of `WEIGHTS` Gaussian weights with one scale, or one a channel of 4096."""

    scales: str
    threads: int
    bits: int = 8
    quick: bool = False

    @property
    def id(self) -> str:
        return f"pim.lhr.{self.scales}.int{self.bits}.t{self.threads}"

    @property
    def shape(self) -> tuple[int, int]:
        return (5000, 5000) if self.scales == "tensor" else (6104, 4096)


class Layer:
    """The weights of a case, their scales and a gradient that is there already.

    `memory` are two buffers of the size of the weights.
    """

    def __init__(self, case: SpeedCase, memory: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight, self.grad = (_at(address, case.shape) for address in memory)
        self.weight.normal_(generator=generator)
        scales = symmetric_scales(self.weight, bits=case.bits)
        self.scales = scales if case.scales == "channel" else scales.amax(0, keepdim=True)
        self.inverse = 1 / self.scales
        self._case = case

    @functools.cached_property
    def expected(self) -> tuple[float, Tensor]:
        """Mean and slopes in fp64, by `reference_lhr`, a part of the channels at a time."""
        total, slopes = 0.0, []
        for i in range(0, self.weight.shape[0], 500):
            scales = self.scales if len(self.scales) == 1 else self.scales[i : i + 500]
            rows = self.weight[i : i + 500]
            position = reference_lhr.positions(rows, scales, rows.shape[1], 0)
            total += float(reference_lhr.interpolated(position, self._case.bits).sum())
            slope = reference_lhr.slope(position[::50], self._case.bits)
            slopes.append(slope / (scales if len(scales) == 1 else scales[::50]))
        return total / self.weight.numel(), torch.cat(slopes)

    def error(self, value: float, factor: float) -> float:
        """Of a value, and of every fiftieth channel's gradient that now is in `grad`.

        A weight so near to an integer that fp32 and fp64 see it on two sides may have either slope:
        the thousandth of the gradients that differ most is left out.
        """
        mean, slopes = self.expected
        scale = 2 * factor * mean / self.weight.numel()
        got = torch.cat([self.grad[i : i + 500][::50] for i in range(0, len(self.grad), 500)])
        apart = (got.double() / scale - slopes).abs().flatten() / slopes.abs().max()
        kept = apart.kthvalue(int(apart.numel() * 0.999)).values
        return max(abs(value / (factor * mean * mean) - 1), float(kept))


def _at(address: int, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    memory = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


PRICES = (20.0, 18.0, 16.0, 14.0, 12.0, 10.0, 8.0)
"""Of a one, to choose from."""
WANTED = 0.9925
"""Cosine on validation sentences: a quarter of the loss that is promised is left. Their mean over
256 is known to 0.0002."""


@dataclass(frozen=True)
class Recipe:
    """How MiniLM is fine-tuned: one pass over its sentences; the price is `chosen_price`."""

    steps: int = 48
    batch: int = 16
    batches: int = 48
    tokens: int = 32
    rate: float = 1e-4
    ratio: float = 3e-3
    shift: int = 16
    price: float = 14.0
    warmup: int = 5
    seed: int = 0


def encode(texts: list[str], tokens: int) -> dict[str, Tensor]:
    """Sentences as MiniLM takes them, cut to that many tokens."""
    tokenizer = minilm_tokenizer()
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in found]),
        "attention_mask": torch.tensor([e.attention_mask for e in found]),
        "token_type_ids": torch.tensor([e.type_ids for e in found]),
    }


def drawn(split: Split, count: int, seed: int) -> list[str]:
    """Sentences of a split, without order but that of the seed."""
    known = common.sentences(split)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known), generator=generator)[:count]
    return [known[int(i)] for i in order]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    tokens = mask.unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * tokens).sum(1) / tokens.sum(1), dim=-1)


@dataclass(frozen=True)
class Tuned:
    """MiniLM with few ones, and how near its embeddings are to those in fp32."""

    report: FitReport
    cosines: Tensor = field(repr=False)
    """Of held-out documents' sentences."""
    validation: Tensor = field(repr=False)
    """As `cosines`, of the sentences that the recipe was chosen with."""
    untrained: Tensor = field(repr=False)
    """As `cosines`, of weights that were only rounded, at the same price."""
    sentences: int
    """That were seen in training."""


@functools.cache
def tuned(recipe: Recipe = Recipe(), say: Callable[[str], None] | None = None) -> Tuned:
    """Distils MiniLM into itself: the same embeddings, from weights with few ones."""
    base, module = minilm(), _trainable(minilm())
    texts = sorted(drawn("calibration", recipe.batch * recipe.batches, recipe.seed), key=len)
    batches = [
        encode(texts[i : i + recipe.batch], recipe.tokens)
        for i in range(0, len(texts), recipe.batch)
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [
        int(i)
        for _ in range(-(-recipe.steps // len(batches)))
        for i in torch.randperm(len(batches), generator=generator)
    ]
    wanted: dict[int, Tensor] = {}

    def loss(step: int) -> Tensor:
        batch = batches[order[step]]
        if order[step] not in wanted:
            with torch.no_grad():
                wanted[order[step]] = base.run(batch)["last_hidden_state"]
        want = wanted[order[step]]
        hidden = module(batch)
        mask = batch["attention_mask"]
        apart = 1 - (pooled(hidden, mask) * pooled(want, mask)).sum(-1).mean()
        tokens = mask.unsqueeze(-1)
        error = ((hidden - want).square() * tokens).sum() / (want.square() * tokens).sum()
        if say is not None:
            say(f"{step} {float(apart.detach()):.5f} {float(error.detach()):.5f}")
        return apart + error

    report = fit(
        module,
        loss,
        steps=recipe.steps,
        ratio=recipe.ratio,
        shift=recipe.shift,
        price=recipe.price,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=recipe.rate),
        warmup=recipe.warmup,
        seed=recipe.seed,
    )
    rounded = _trainable(base)
    fit(rounded, loss, steps=0, shift=recipe.shift, price=recipe.price)
    graphs = [module.graph(), rounded.graph()]
    cosines, untrained = (_cosines(base, graph, "held-out") for graph in graphs)
    validation = _cosines(base, graphs[0], "validation")
    seen = recipe.batch * len(set(order[: recipe.steps]))
    return Tuned(report, cosines, validation, untrained, seen)


@functools.cache
def chosen_price() -> float | None:
    """The highest of `PRICES` at which validation sentences keep what is `WANTED`, if any."""
    return first_enough(
        PRICES, lambda price: float(tuned(Recipe(price=price)).validation.mean()) >= WANTED
    )


def _cosines(base: Graph, changed: Graph, split: Split) -> Tensor:
    inputs = encode(drawn(split, 256, 0), 64)
    return (language.embed(base, inputs) * language.embed(changed, inputs)).sum(-1)


def _trainable(graph: Graph) -> GraphModule:
    """The network, of which the linear layers are trained, and all biases."""
    module = graph.module()
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            weight.requires_grad_(isinstance(layer, nn.Linear))
    return module
