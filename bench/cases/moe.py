"""Layers for the mixture-of-experts benchmarks: regimes of the scheduler, and three models.

Axes: n activated experts of one layer. Times are in milliseconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quernstone.moe import MODELS as PUBLISHED
from quernstone.moe import PRESETS, CostModel, ExpertsShape, Layer

Loads = NDArray[np.int64]
# Stand-ins of HybriMoE's public repository for all its models, which asks that they be measured.
REPOSITORY_GPU = 0.5
REPOSITORY_TRANSFER = 0.4179
REPOSITORY_CPU_FIRST = 0.79


@dataclass(frozen=True)
class Regime:
    """Random layers of one kind: loads, share of cached experts and costs."""

    name: str
    experts: int
    hit: float
    """Probability that an expert is cached."""
    cpu_per_token: float
    pareto: float | None = None
    """Exponent of the loads, from 1 token to `MOST_TOKENS`; None: one token each."""
    transfer: float = REPOSITORY_TRANSFER
    mixed: bool = False
    """Experts of 2 and 4 bits, and a GPU whose time grows with the load: costs of their own."""

    def layers(self, count: int, seed: int = 0) -> list[Layer]:
        rng = np.random.default_rng(seed)
        return [self._layer(rng) for _ in range(count)]

    def _layer(self, rng: np.random.Generator) -> Layer:
        n = self.experts
        loads = np.ones(n, dtype=np.int64)
        if self.pareto is not None:
            loads += np.minimum(rng.pareto(self.pareto, n), MOST_TOKENS - 1).astype(np.int64)
        cached = rng.random(n) < self.hit
        size = rng.choice([0.5, 1.0], n) if self.mixed else np.ones(n)
        gpu = REPOSITORY_GPU * (0.5 + 0.5 * size + 0.02 * loads if self.mixed else size)
        return Layer(
            loads,
            cached,
            self.cpu_per_token * size * loads,
            gpu,
            self.transfer * size,
            cpu_first=REPOSITORY_CPU_FIRST,
        )


MOST_TOKENS = 64
SLOW_PCIE = 4.0
REGIMES = [
    Regime(f"{name}.hit{hit}", n, hit / 100, cpu, pareto, transfer, mixed)
    for name, n, hits, cpu, pareto, transfer, mixed in (
        ("decode8", 8, (25, 75), 1.0, None, REPOSITORY_TRANSFER, False),
        ("decode6.slow", 6, (25, 75), 1.0, None, SLOW_PCIE, False),
        ("prefill12.skewed", 12, (50, 75), 0.05, 0.8, REPOSITORY_TRANSFER, False),
        ("prefill12", 12, (25, 75), 1.0, 0.8, REPOSITORY_TRANSFER, False),
        ("prefill64", 64, (25, 50, 75), 0.05, 0.8, REPOSITORY_TRANSFER, False),
        ("mixed12", 12, (25, 50, 75), 0.05, 0.8, REPOSITORY_TRANSFER, True),
        ("mixed64", 64, (25, 50, 75), 0.05, 0.8, REPOSITORY_TRANSFER, True),
    )
    for hit in hits
]


@dataclass(frozen=True)
class Model:
    """The routed experts of one layer."""

    name: str
    repository_cpu: float
    """ms a token on the CPU, from the comments of HybriMoE's repository."""

    @property
    def shape(self) -> ExpertsShape:
        """Of its experts, in int4 in groups of 32."""
        of = PUBLISHED[self.name]
        return ExpertsShape(of.experts, of.hidden, of.intermediate)

    @property
    def top_k(self) -> int:
        return PUBLISHED[self.name].top_k


MODELS = [
    Model("mixtral-8x7b", 0.2),
    Model("deepseek-v2-lite", 1.0),
    Model("qwen2-57b-a14b", 0.8),
]
# The machine of HybriMoE's evaluation.
MACHINE = PRESETS["a6000-xeon10"]
MILLI = 1e3

Source = Literal["published", "repository"]
Phase = Literal["decode", "prefill"]
PREFILL_TOKENS = 128
# Exponent of the experts' popularity over their rank.
ZIPF = 0.8


def layer_of(model: Model, source: Source, loads: Loads, cached: NDArray[np.bool_]) -> Layer:
    """The activated experts of a model's layer with costs from one of the two sets of constants."""
    if source == "repository":
        cpu = model.repository_cpu * loads
        return Layer(
            loads, cached, cpu, REPOSITORY_GPU, REPOSITORY_TRANSFER, cpu_first=REPOSITORY_CPU_FIRST
        )
    costs = CostModel.of_machine(MACHINE, model.shape)
    return Layer(
        loads,
        cached,
        MILLI * costs.cpu_seconds(loads),
        MILLI * costs.gpu(loads),
        MILLI * costs.transfer,
        cpu_first=MILLI * costs.cpu_first,
    )


def constants_of(model: Model, source: Source) -> list[str]:
    """What a row of the model has to print."""
    if source == "published":
        figures = MACHINE.figures.items()
        return ["; ".join(f"{name} {figure}, {figure.note}" for name, figure in figures)]
    return [
        f"constants of HybriMoE's repository, not measured: CPU {model.repository_cpu:g} ms a "
        f"token + {REPOSITORY_CPU_FIRST} for the first, GPU {REPOSITORY_GPU} an expert, transfer "
        f"{REPOSITORY_TRANSFER}"
    ]


@functools.lru_cache(maxsize=16)
def model_layers(
    model: Model, source: Source, phase: Phase, share: float, count: int = 200, seed: int = 0
) -> tuple[Layer, ...]:
    """Layers whose router draws top-k experts a token by popularity.

    A uniformly random share of all experts is cached. Popularity falls with rank to the power
    `ZIPF` in prefill; a decoded token draws uniformly.
    """
    rng = np.random.default_rng(seed)
    tokens = PREFILL_TOKENS if phase == "prefill" else 1
    layers = []
    for _ in range(count):
        rank = rng.permutation(model.shape.count) + 1.0
        popularity = -ZIPF * np.log(rank) if phase == "prefill" else np.zeros(model.shape.count)
        # The largest k of log p + Gumbel noise are k draws without replacement.
        score = popularity + rng.gumbel(size=(tokens, model.shape.count))
        chosen = np.argpartition(-score, model.top_k - 1, axis=1)[:, : model.top_k]
        loads = np.bincount(chosen.ravel(), minlength=model.shape.count)
        cached = np.zeros(model.shape.count, dtype=np.bool_)
        cached[rng.permutation(model.shape.count)[: round(share * model.shape.count)]] = True
        active = loads > 0
        layers.append(layer_of(model, source, loads[active].astype(np.int64), cached[active]))
    return tuple(layers)
