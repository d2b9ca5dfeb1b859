"""Policies that give every expert a number and evict the smallest: LFU, LFRU, MRS."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernstone.moe.cache.base import ExpertCache, probabilities, sum_in_order, whole


class ScoredCache(ExpertCache):
    """Evicts the smallest value; among equals the one used or loaded longest ago."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._ticks = 0
        self._last: dict[int, int] = {}  # of the residents, in ticks: one for every use or load

    @abstractmethod
    def _value(self, key: int) -> float:
        """What keeping a key is worth."""

    def _touch(self, key: int, first_use: bool) -> None:
        self._last[key] = self._ticks
        self._ticks += 1

    def _admit(self, key: int) -> None:
        self._last[key] = self._ticks
        self._ticks += 1

    def _victim(self, key: int) -> int:
        candidates = filter(self._may_go, self._resident)
        victim = min(candidates, key=lambda key: (self._value(key), self._last[key]))
        self._forget(victim)
        return victim

    def _forget(self, key: int) -> None:
        del self._last[key]


class LFU(ScoredCache):
    """Least frequently used first: the number of steps that needed an expert, resident or not.

    Args:
        slots: how many experts fit.
        remember: count what was used before the expert was last loaded too. Without, as in
            caches that know only what they hold, new experts push out one another.
        halve_every: steps after which all counts are halved, so that the past fades; None: never.

    Oracle: libcachesim's LFU, hit for hit, without `remember` and where every step has one key.
    """

    def __init__(
        self, slots: int, *, remember: bool = True, halve_every: int | None = None
    ) -> None:
        super().__init__(slots)
        self.remember = remember
        self.halve_every = None if halve_every is None else whole("halve_every", halve_every, 1)
        self._uses: defaultdict[int, float] = defaultdict(float)
        self._steps = 0

    def _observe(self, keys: tuple[int, ...], scores: ArrayLike | None, first: int) -> None:
        if self.halve_every and self._steps and self._steps % self.halve_every == 0:
            for key in self._uses:
                self._uses[key] /= 2.0
        self._steps += 1
        if self.remember:
            for key in keys:
                self._uses[key] += 1.0

    def _touch(self, key: int, first_use: bool) -> None:
        super()._touch(key, first_use)
        if not self.remember:
            self._uses[key] += 1.0

    def _admit(self, key: int) -> None:
        super()._admit(key)
        if not self.remember:
            self._uses[key] = float(key in self._in_use)

    def _value(self, key: int) -> float:
        return self._uses[key]


class LFRU(ScoredCache):
    """Uses since the expert was loaded, divided by one more than the steps since the last.

    Source: the expert cache proposed for vLLM (pull request 37190), "frequency-weighted LRU".
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._steps = 0
        self._uses: dict[int, int] = {}
        self._last_step: dict[int, int] = {}

    def _observe(self, keys: tuple[int, ...], scores: ArrayLike | None, first: int) -> None:
        self._steps += 1

    def _touch(self, key: int, first_use: bool) -> None:
        super()._touch(key, first_use)
        self._uses[key] += 1
        self._last_step[key] = self._steps

    def _admit(self, key: int) -> None:
        super()._admit(key)
        self._uses[key] = int(key in self._in_use)
        self._last_step[key] = self._steps

    def _value(self, key: int) -> float:
        return self._uses[key] / (self._steps - self._last_step[key] + 1)


Reduction = Literal["mean", "sum"]


class MRS(ScoredCache):
    """Minus recent score: experts that the router came close to choosing are kept too.

    S = alpha TopP(s) + (1 - alpha) S for every expert of the layer that runs, where s is the
    router's softmax and TopP makes all but its p largest numbers 0 (of equals the first stay);
    p is 2 top_k. Where a step has several tokens, TopP is taken of each and then the mean: a
    prompt moves S no further than one token does. With `reduction` "sum" it counts by its tokens.

    Args:
        slots: how many experts fit.
        top_k: experts of a token.
        alpha: weight of the newest step, above 0 and at most 1.
        reduction: over the tokens of a step.

    Source: HybriMoE, arXiv 2504.05897, section on score-aware caching; alpha as in its code.
    """

    def __init__(
        self, slots: int, *, top_k: int, alpha: float = 0.5, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(slots)
        self.keep = 2 * whole("top_k", top_k, 1)
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha: got {alpha}, expected above 0 and at most 1")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
        self.alpha = alpha
        self.reduction: Reduction = reduction
        self._score: defaultdict[int, float] = defaultdict(float)

    def _observe(self, keys: tuple[int, ...], scores: ArrayLike | None, first: int) -> None:
        recent = recent_scores(probabilities(scores, "MRS"), self.keep, self.reduction)
        for expert, score in enumerate(recent.tolist(), first):
            self._score[expert] = self.alpha * score + (1.0 - self.alpha) * self._score[expert]

    def _value(self, key: int) -> float:
        return self._score[key]


def recent_scores(
    scores: NDArray[np.float64], keep: int, reduction: Reduction
) -> NDArray[np.float64]:
    """[e]: TopP of the rows of a step, reduced over its tokens."""
    total = sum_in_order(top_p(scores, keep))
    return total / len(scores) if reduction == "mean" else total


def top_p(scores: NDArray[np.float64], keep: int) -> NDArray[np.float64]:
    """[t, e]: the `keep` largest numbers of each row, the first of equals, and 0 for the rest."""
    if keep >= scores.shape[1]:
        return scores
    order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    kept = np.zeros_like(scores)
    np.put_along_axis(kept, order, np.take_along_axis(scores, order, axis=1), axis=1)
    return kept
