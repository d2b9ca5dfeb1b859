"""The clairvoyant bound: evict what is needed last."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from numpy.typing import ArrayLike

from quernstone.moe.cache.base import Insertion, StepResult
from quernstone.moe.cache.scored import ScoredCache


class Belady(ScoredCache):
    """Knows all steps beforehand and evicts the expert whose next use is furthest away.

    The bound in which sense: no rule loads fewer experts over all the steps, among the rules that
    work as every cache here does. The experts of a step are all resident while it runs, so that
    each one absent is loaded and takes a slot, and none of them gives way to another. Proof, by
    exchange: say that after some step the best schedule has evicted x and kept y, both outside of
    the step, and x is needed no later than y. Evict y instead and go on as that schedule does, x
    in the place of y, until it evicts y (evict x then: both hold the same again) or x is needed.
    There it loads x. If y is still waiting, load y at that cost, and both hold the same; loading
    y not now but when it is needed costs no more. If y is needed in that step too, it is y that
    the changed schedule loads there, at the same cost, and both hold the same. So keeping x is
    never worse. That a step needs several experts at once matters only in that they are not
    evicted, neither by one schedule nor by the other.

    A step larger than the cache leaves nothing of others. Here the bound has more freedom than
    the other policies: of all its experts, hits and misses alike, those needed first keep or take
    the slots once the step is over. Then what it leaves depends on no earlier choice, the exchange
    holds as above, and no policy here is above the bound; but none may be able to reach it.

    Not keeping what a step that fits has loaded, and loading ahead of need, are outside of the
    bound; so are pins, and both `pin` and `insert` are refused.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5 (2), 1966. Oracle: exhaustive search.
    """

    def __init__(self, slots: int, future: Sequence[Iterable[int]]) -> None:
        super().__init__(slots)
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)
        self._steps = 0
        self._future = [frozenset(step) for step in future]
        for step, keys in enumerate(self._future):
            for key in keys:
                self._uses[key].append(step)

    def insert(self, expert: int) -> Insertion:
        raise ValueError(f"expert: got {expert} to prefetch, expected none: the bound has no such")

    def pin(self, expert: int) -> None:
        raise ValueError(f"expert: got {expert} to pin, expected none: the bound has no such")

    def _observe(self, keys: tuple[int, ...], scores: ArrayLike | None, first: int) -> None:
        if self._steps == len(self._future) or frozenset(keys) != self._future[self._steps]:
            said = sorted(self._future[self._steps]) if self._steps < len(self._future) else "none"
            raise ValueError(
                f"experts: got {sorted(keys)} in step {self._steps}, expected {said} as foretold"
            )
        self._steps += 1
        for key in keys:
            self._uses[key].popleft()

    def _serve(self, keys: tuple[int, ...]) -> StepResult:
        if len(keys) <= self._slots:
            return super()._serve(keys)
        hits = tuple(key for key in keys if key in self._resident)
        misses = tuple(key for key in keys if key not in self._resident)
        keep = sorted(keys, key=self._value, reverse=True)[: self._slots]
        evicted = tuple(key for key in self._resident if key not in keep)
        for key in evicted:
            self._drop(key)
            self._forget(key)
        for key in keep:
            if key not in self._resident:
                self._resident[key] = None
            self._admit(key)
        streamed = tuple(key for key in misses if key not in keep)
        return StepResult(hits, misses, evicted, (), streamed)

    def _value(self, key: int) -> float:
        uses = self._uses[key]
        return -uses[0] if uses else -math.inf
