"""A policy that learns from the router, while it runs, how often each expert will be used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone.moe.cache.base import probabilities, sum_in_order
from quernstone.moe.cache.scored import ScoredCache

RATES = (1.0, 1 / 4, 1 / 20, 1 / 500)
"""Of the moving averages of an expert's log score: this token, a phrase, a paragraph, always."""
USE_RATE = 1 / 500
DISCOUNT = 0.9
MEMORY = 0.9998
RIDGE = 1e-3
FLOOR = 0.1
FEATURES = 1 + len(RATES) + 2


class ExpectedReuse(ScoredCache):
    """Evicts the expert with the smallest expected number of future uses, the near ones first.

    V(x) = E[sum over i >= 1 of DISCOUNT^(i-1) used(i steps ahead)] is linear in a few features x
    of an expert: one; the log of its router score, averaged at four time scales; its share of
    uses, averaged at the slowest; 1 / (1 + steps since its last use). Weights w solve
    (sum m x (x - DISCOUNT x')^T + RIDGE) w = sum m x used', over all experts of the layer and
    all steps so far, where x' and used' are of the step after x and m = MEMORY^age: the least
    squares solution of the temporal difference equation, without a learning rate. They are
    solved for in every one of the first 32 steps and in every eighth from then on. The policy
    starts without knowledge, learns each layer for itself, and does not look ahead.

    The constants were set on synthetic routers and are not fitted to any model. Scores should be
    the whole softmax: where only its largest numbers are kept, much of what they say is lost.

    Source: Bradtke, Barto, "Linear least-squares algorithms for temporal difference learning",
    Machine Learning 22, 1996; its use for caching experts is this project's own.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._layers: dict[int, _Layer] = {}
        self._values: dict[int, float] = {}

    def _observe(self, keys: tuple[int, ...], scores: ArrayLike | None, first: int) -> None:
        mean = mean_over_tokens(probabilities(scores, "ExpectedReuse"))
        logs: NDArray[np.float64] = np.log(uniform_shares(mean))
        layer = self._layers.setdefault(first, _Layer(len(logs)))
        if len(logs) != layer.experts:
            raise ValueError(f"scores.shape: got {len(logs)} experts, expected {layer.experts}")
        outside = [key for key in keys if not first <= key < first + len(logs)]
        if outside:
            raise ValueError(
                f"experts: got {outside[0]}, expected {first} to {first + len(logs) - 1} as scored"
            )
        values = layer.step([key - first for key in keys], logs)
        self._values.update(enumerate(values.tolist(), first))

    def _value(self, key: int) -> float:
        return self._values.get(key, 0.0)


class _Layer:
    """What is known of the experts of one layer. Sums run from the first expert to the last, so
    that another implementation of this arithmetic gives the same bits."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._steps = 0
        self._averages = np.zeros((len(RATES), experts))
        self._use = np.zeros(experts)
        self._age = np.full(experts, np.inf)
        self._features = np.zeros((experts, FEATURES))
        self._matrix = np.zeros((FEATURES, FEATURES))
        self._right = np.zeros(FEATURES)
        self._weights = [0.0] * FEATURES

    def step(self, used: Sequence[int], logs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Learns from a step and gives V of every expert."""
        self._steps += 1
        now = np.zeros(self.experts)
        now[used] = 1.0
        for average, rate in zip(self._averages, RATES, strict=True):
            average += max(rate, 1.0 / self._steps) * (logs - average)
        self._use += max(USE_RATE, 1.0 / self._steps) * (now - self._use)
        self._age += 1.0
        self._age[used] = 0.0
        before = self._features
        self._features = np.column_stack(
            (np.ones(self.experts), *self._averages, self._use, 1.0 / (1.0 + self._age))
        )
        if self._steps > 1:
            difference = before - DISCOUNT * self._features
            products = before[:, :, None] * difference[:, None, :]
            self._matrix = MEMORY * self._matrix + sum_in_order(products)
            self._right = MEMORY * self._right + sum_in_order(before * now[:, None])
            if self._steps <= 32 or self._steps % 8 == 0:
                solution = _solve(self._matrix + RIDGE * np.eye(FEATURES), self._right)
                self._weights = solution or self._weights
        value = self._weights[0] * self._features[:, 0]
        for weight, column in zip(self._weights[1:], self._features.T[1:], strict=True):
            value += weight * column
        return value


def uniform_shares(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., e]: scores in shares of the uniform one, kept off zero."""
    shares: NDArray[np.float64] = scores.shape[-1] * scores + FLOOR
    return shares


def mean_over_tokens(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = sum_in_order(rows) / len(rows)
    return mean


def _solve(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> list[float] | None:
    """Gaussian elimination with the largest pivot of the column, the first of equals; None where
    the matrix is singular."""
    rows = [[*row, value] for row, value in zip(matrix.tolist(), right.tolist(), strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        if rows[column][column] == 0.0:
            return None
        for i in range(column + 1, size):
            factor = rows[i][column] / rows[column][column]
            for j in range(column, size + 1):
                rows[i][j] -= factor * rows[column][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        rest = rows[i][size]
        for j in range(i + 1, size):
            rest -= rows[i][j] * solution[j]
        solution[i] = rest / rows[i][i]
    return solution
