"""Policies that keep their experts in lists: LRU, S3-FIFO, ARC."""

from __future__ import annotations

from collections import OrderedDict

from quernstone.moe.cache.base import ExpertCache


class LRU(ExpertCache):
    """Least recently used first; keys of one step are used in the order in which it names them.

    Oracle: libcachesim's LRU, hit for hit, where every step has one key.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._queue: OrderedDict[int, None] = OrderedDict()

    def _touch(self, key: int, first_use: bool) -> None:
        self._queue.move_to_end(key)

    def _admit(self, key: int) -> None:
        self._queue[key] = None

    def _victim(self, key: int) -> int:
        victim = next(filter(self._may_go, self._queue))
        del self._queue[victim]
        return victim

    def _forget(self, key: int) -> None:
        del self._queue[key]


class S3FIFO(ExpertCache):
    """Three queues: a small one on probation, a main one, and the ghosts of the evicted.

    A tenth of the slots, at least one, is the small queue; ghosts are 0.9 times the slots. A new
    key enters the small queue, or the main one when its ghost is there, and also, as long as
    nothing was ever evicted, when the small one is full. Each use adds one, to 3 at most. The
    small queue gives way unless the main one is over its share: used twice or more moves to main
    and starts at 0, the rest is evicted and leaves a ghost. In main a used key goes round with
    one use less, an unused one is evicted.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1,
    with what its authors' simulator does before the cache is full. Oracle: libcachesim's S3FIFO,
    hit for hit, from 20 slots (below, its small queue refuses everything).
    """

    _MOST = 3

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._small_slots = max(1, self._slots // 10)
        self._main_slots = self._slots - self._small_slots
        self._most_ghosts = self._slots * 9 // 10
        self._small: OrderedDict[int, int] = OrderedDict()  # key -> uses
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._knew_it = False
        self._evicting = False

    def _touch(self, key: int, first_use: bool) -> None:
        if not first_use:
            queue = self._small if key in self._small else self._main
            queue[key] = min(queue[key] + 1, self._MOST)

    def _miss(self, key: int) -> None:
        self._knew_it = key in self._ghosts
        if self._knew_it:
            del self._ghosts[key]

    def _admit(self, key: int) -> None:
        overflow = not self._evicting and len(self._small) >= self._small_slots
        (self._main if self._knew_it or overflow else self._small)[key] = 0

    def _victim(self, key: int) -> int:
        self._evicting = True
        while True:
            main_is_over = len(self._main) > self._main_slots
            queues = (self._victim_of_main, self._victim_of_small)
            for victim_of in queues if main_is_over else reversed(queues):
                victim = victim_of()
                if victim is not None:
                    return victim

    def _victim_of_small(self) -> int | None:
        while (key := self._oldest(self._small)) is not None:
            if self._small.pop(key) < 2:
                self._bury(key)
                return key
            self._main[key] = 0
        return None

    def _victim_of_main(self) -> int | None:
        while (key := self._oldest(self._main)) is not None:
            uses = self._main.pop(key)
            if not uses:
                return key
            self._main[key] = uses - 1
        return None

    def _bury(self, key: int) -> None:
        if not self._most_ghosts:
            return
        if len(self._ghosts) >= self._most_ghosts:
            self._ghosts.popitem(last=False)
        self._ghosts[key] = None

    def _oldest(self, queue: OrderedDict[int, int]) -> int | None:
        return next(filter(self._may_go, queue), None)

    def _forget(self, key: int) -> None:
        del (self._small if key in self._small else self._main)[key]


class ARC(ExpertCache):
    """Two LRU lists, of keys used once and of keys used again, whose shares adapt.

    t1 and t2 are resident, b1 and b2 the ghosts of those evicted from them; p is the share of t1
    that is aimed at, a real number. A ghost that is needed again moves p towards its list. The
    lists of ghosts are cut after an eviction, which is the same as before it.

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure
    4. Oracle: libcachesim's ARC, hit for hit, where every step has one key.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._t1: OrderedDict[int, None] = OrderedDict()
        self._t2: OrderedDict[int, None] = OrderedDict()
        self._b1: OrderedDict[int, None] = OrderedDict()
        self._b2: OrderedDict[int, None] = OrderedDict()
        self._p = 0.0

    def _touch(self, key: int, first_use: bool) -> None:
        if key in self._t2:
            self._t2.move_to_end(key)
        elif first_use:
            self._t1.move_to_end(key)
        else:
            del self._t1[key]
            self._t2[key] = None

    def _miss(self, key: int) -> None:
        if key in self._b1:
            self._p = min(self._p + max(len(self._b2) / len(self._b1), 1.0), float(self._slots))
        elif key in self._b2:
            self._p = max(self._p - max(len(self._b1) / len(self._b2), 1.0), 0.0)

    def _victim(self, key: int) -> int:
        ones, again = (self._t1, self._b1), (self._t2, self._b2)
        t1 = len(self._t1)
        from_ones = t1 > self._p or (t1 == self._p and key in self._b2)
        lists = (ones, again) if from_ones else (again, ones)
        victim, (alive, ghosts) = next(
            (key, pair) for pair in lists for key in pair[0] if self._may_go(key)
        )
        del alive[victim]
        ghosts[victim] = None
        return victim

    def _admit(self, key: int) -> None:
        if key in self._b1 or key in self._b2:
            (self._b1 if key in self._b1 else self._b2).pop(key)
            self._t2[key] = None
        else:
            self._t1[key] = None
        while len(self._t1) + len(self._b1) > self._slots:
            self._b1.popitem(last=False)
        while len(self._t2) + len(self._b2) > 2 * self._slots - len(self._t1) - len(self._b1):
            self._b2.popitem(last=False)

    def _forget(self, key: int) -> None:
        (self._t1 if key in self._t1 else self._t2).pop(key)
