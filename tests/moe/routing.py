"""Synthetic routers for tests. Random routing says nothing about which policy serves a model."""

import numpy as np
from numpy.typing import NDArray

from quernstone.moe.trace import Trace


def ar1_scores(
    seed: int,
    *,
    layers: int = 1,
    tokens: int = 300,
    experts: int = 64,
    memory: float = 0.8,
    bias: float = 0.5,
) -> NDArray[np.float64]:
    """[l, t, e] softmax of logits that remember their last value, with a bias of each expert."""
    rng = np.random.default_rng(seed)
    base = bias * rng.standard_normal((layers, experts))
    state = rng.standard_normal((layers, experts))
    logits = np.empty((layers, tokens, experts))
    for token in range(tokens):
        noise = rng.standard_normal((layers, experts))
        state = memory * state + np.sqrt(1 - memory**2) * noise
        logits[:, token] = base + state
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    scores: NDArray[np.float64] = weights / weights.sum(axis=2, keepdims=True)
    return scores


def ar1_trace(seed: int, *, top_k: int = 6, batches: bool = False, **router: float) -> Trace:
    """A trace of such a router; `batches`: steps of one to five tokens."""
    scores = ar1_scores(seed, **router)  # type: ignore[arg-type]
    steps = None
    if batches:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 6, scores.shape[1])
        steps = np.repeat(np.arange(len(sizes)), sizes)[: scores.shape[1]]
    return Trace.of(scores, top_k, steps=steps)
