"""What every expert cache does alike: slots, residents, steps, prefetches, pins."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class StepResult(NamedTuple):
    """What became of the experts of a step; `hits`, `arriving` and `misses` share them out."""

    hits: tuple[int, ...]
    """Resident before the step."""
    misses: tuple[int, ...]
    """To be loaded now, in the order in which they took their slots."""
    evicted: tuple[int, ...]
    """Gave up their slots to the misses, in that order."""
    arriving: tuple[int, ...] = ()
    """Prefetched and still in flight: the step waits for them instead of loading them."""
    streamed: tuple[int, ...] = ()
    """The misses for which no slot was free: loaded for this step and not kept."""


class Insertion(NamedTuple):
    """What became of a prefetch."""

    taken: bool
    """It has a slot: load it, or find it there already."""
    evicted: tuple[int, ...] = ()


class ExpertCache(ABC):
    """A fixed number of slots for experts, and the rule by which one gives way to another.

    A key is a number that stands for an expert: its index, in the cache of one layer; the layer
    times the number of experts plus the index, in a cache that all layers share. A step is what
    has to be in memory at once: the experts of a token, or of all tokens of a batch. Its keys may
    repeat and count once. These never give way: the experts of the latest step, until the next
    one or `release`; those that are pinned; those in flight. Where the misses of a step find no
    slot for that reason, they stream through, loaded and not kept: no budget is too small, and
    with none (0 slots) everything streams.

    Keys take their slots in the order in which a step names them. All policies are deterministic.
    """

    def __init__(self, slots: int) -> None:
        self._slots = whole("slots", slots)
        self._resident: dict[int, None] = {}  # a set that remembers the order of loading
        self._in_flight: set[int] = set()
        self._unused: set[int] = set()  # prefetched and not yet needed
        self._pinned: set[int] = set()
        self._in_use: frozenset[int] = frozenset()

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return self._slots

    @property
    def resident(self) -> frozenset[int]:
        """Keys that hold a slot, those in flight among them."""
        return frozenset(self._resident)

    @property
    def in_flight(self) -> frozenset[int]:
        """Keys that hold a slot but not yet their weights."""
        return frozenset(self._in_flight)

    @property
    def pinned(self) -> frozenset[int]:
        return frozenset(self._pinned)

    def step(
        self, experts: Iterable[int], scores: ArrayLike | None = None, *, first: int = 0
    ) -> StepResult:
        """Has the experts of one step brought in; they are in use until the next step.

        Axes: t tokens, e experts.

        Args:
            experts: keys that the step needs.
            scores: [t, e] or [e], the router's softmax over all experts of the layer; for the
                policies that go by it (MRS, Hazard), and ignored by the others.
            first: key of the expert that `scores` begins with: 0, or in a shared cache the layer
                times e.

        Raises:
            ValueError: a key below 0; scores that the policy needs are missing, or not finite, or
                below 0, or of another shape.
            TypeError: a key that is not an integer.
        """
        keys = tuple(dict.fromkeys(_key("experts", key) for key in experts))
        self._in_use = frozenset(keys)
        self._observe(keys, scores, first)
        return self._serve(keys)

    def insert(self, expert: int) -> Insertion:
        """Gives a slot to an expert that will be needed: it is in flight until `arrived`.

        An expert that has a slot already is left as it is. Where no slot can be had the answer is
        `taken` False, and nothing has changed.
        """
        key = _key("expert", expert)
        if key in self._resident:
            return Insertion(taken=True)
        taken, victims = self._take(key, prefetch=True)
        if taken:
            self._in_flight.add(key)
            self._unused.add(key)
        return Insertion(taken, victims)

    def arrived(self, expert: int) -> None:
        """A prefetched expert's weights are there. A step that needed it says so by itself."""
        key = _key("expert", expert)
        if key not in self._resident:
            raise ValueError(f"expert: got {key}, expected one that was inserted")
        self._in_flight.discard(key)

    def cancel(self, expert: int) -> None:
        """A prefetch is given up, and its slot is free."""
        key = _key("expert", expert)
        if key not in self._in_flight:
            raise ValueError(f"expert: got {key}, expected one in flight")
        self._drop(key)
        self._forget(key)

    def pin(self, expert: int) -> None:
        """Has an expert stay once it is resident, until `unpin`."""
        self._pinned.add(_key("expert", expert))

    def unpin(self, expert: int) -> None:
        self._pinned.discard(_key("expert", expert))

    def release(self) -> None:
        """The latest step is over: its experts may give way, to a prefetch for one."""
        self._in_use = frozenset()

    def _serve(self, keys: tuple[int, ...]) -> StepResult:
        """Brings in the distinct keys of a step."""
        hits: list[int] = []
        misses: list[int] = []
        evicted: list[int] = []
        arriving: list[int] = []
        streamed: list[int] = []
        for key in keys:
            if key in self._resident:
                if key in self._in_flight:
                    self._in_flight.remove(key)
                    arriving.append(key)
                else:
                    hits.append(key)
                self._touch(key, key in self._unused)
                self._unused.discard(key)
                continue
            misses.append(key)
            taken, victims = self._take(key)
            evicted.extend(victims)
            if not taken:
                streamed.append(key)
        return StepResult(
            tuple(hits), tuple(misses), tuple(evicted), tuple(arriving), tuple(streamed)
        )

    def _take(self, key: int, prefetch: bool = False) -> tuple[bool, tuple[int, ...]]:
        """Whether the key got a slot, and who lost one for it."""
        full = len(self._resident) >= self._slots
        if full and not any(map(self._may_go, self._resident)):
            return False, ()
        self._miss(key)
        evicted: tuple[int, ...] = ()
        if full:
            victim = self._victim(key)
            self._drop(victim)
            evicted = (victim,)
        self._resident[key] = None
        self._admit(key)
        return True, evicted

    def _drop(self, key: int) -> None:
        del self._resident[key]
        self._in_flight.discard(key)
        self._unused.discard(key)

    def _may_go(self, key: int) -> bool:
        return not (key in self._in_use or key in self._in_flight or key in self._pinned)

    def _observe(  # noqa: B027 (most policies have nothing to do here)
        self, keys: tuple[int, ...], scores: ArrayLike | None, first: int
    ) -> None:
        """A step begins."""

    def _miss(self, key: int) -> None:  # noqa: B027 (nor here)
        """A key that is not resident will be given a slot."""

    @abstractmethod
    def _touch(self, key: int, first_use: bool) -> None:
        """A resident key is used; `first_use`: it was prefetched, and this is why."""

    @abstractmethod
    def _admit(self, key: int) -> None:
        """A key has been given a slot."""

    @abstractmethod
    def _victim(self, key: int) -> int:
        """Takes a resident that may go out of the policy's lists, for a key to come in."""

    @abstractmethod
    def _forget(self, key: int) -> None:
        """A key in flight loses its slot to nobody."""


def probabilities(scores: ArrayLike | None, policy: str) -> NDArray[np.float64]:
    """[t, e] fp64 of the scores of a step, after all checks."""
    if scores is None:
        raise ValueError(f"scores: got None, expected the router's softmax: {policy} goes by it")
    rows = np.asarray(scores)
    if rows.dtype.kind not in "fiu":
        raise ValueError(f"scores.dtype: got {rows.dtype}, expected a floating type")
    rows = rows.astype(np.float64)
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"scores.shape: got {np.shape(scores)}, expected (tokens, experts)")
    low, high = rows.min(), rows.max()
    if not (low >= 0.0 and high < np.inf):
        bad = high if low >= 0.0 else low
        raise ValueError(f"scores: got {bad}, expected finite numbers, 0 or more")
    return rows


def sum_in_order(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over the first axis, taken from its first row to its last: compiled code that adds in
    this order gets the same bits, which NumPy's own sum does not promise."""
    total: NDArray[np.float64] = rows.cumsum(axis=0)[-1]
    return total


def whole(name: str, value: Any, least: int = 0) -> int:
    """An int or NumPy integer that is large enough, as int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected int")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}: got {number}, expected at least {least}")
    return number


def _key(name: str, key: Any) -> int:
    # Most keys are plain and right, and a step has many.
    return key if type(key) is int and key >= 0 else whole(name, key)
