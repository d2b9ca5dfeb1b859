"""What a cache would have hit: policies on routing traces.

Axes: p points (a number of slots each), l layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernstone import _core
from quernstone.moe.cache import LFU, MRS, Belady, ExpectedReuse
from quernstone.moe.cache.base import ExpertCache, whole
from quernstone.moe.cache.policies import NEED_SCORES, Policy, check_policy, make_cache
from quernstone.moe.stream import Stream, layer_stream, shared_stream
from quernstone.moe.trace import Trace

Slots = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class HitCurve:
    """Hits of one policy on one trace for some numbers of slots.

    A request is an expert that a step needs, counted once however many tokens of the step chose
    it: it costs one load at most.
    """

    policy: str
    slots: tuple[int | tuple[int, ...], ...]
    """[p] slots of each layer, or of each one by itself; of all layers where they share."""
    hits: NDArray[np.int64]
    """[p, l]"""
    stalls: NDArray[np.int64]
    """[p, l] steps with a miss."""
    requests: NDArray[np.int64]
    """[l]"""
    steps: int

    @property
    def rate(self) -> NDArray[np.float64]:
        """[p] share of requests that hit, over all layers."""
        rate: NDArray[np.float64] = self.hits.sum(axis=1) / self.requests.sum()
        return rate

    @property
    def layer_rate(self) -> NDArray[np.float64]:
        """[p, l]"""
        rate: NDArray[np.float64] = self.hits / self.requests
        return rate


def replay(
    trace: Trace,
    policy: Policy | Callable[[int], ExpertCache],
    slots: Slots | Sequence[Slots],
    *,
    shared: bool = False,
    **options: Any,
) -> HitCurve:
    """Runs a trace through a cache for each number of slots, every cache empty at first.

    Args:
        trace: the routing of a model.
        policy: a name of `POLICIES`, or what makes a cache of a number of slots.
        slots: one number for every layer, or a list of them, one for each point of the curve. A
            point may be a list itself: one number a layer.
        shared: one cache for all layers, and `slots` is its size.
        options: of the policy, by the names that its class gives them.

    Raises:
        ValueError: the policy is unknown, or needs scores that the trace lacks; a number of slots
            below 0; a list of slots of another length than the layers are.
        TypeError: a number of slots that is no integer.
    """
    if isinstance(policy, str):
        check_policy(policy)
        if policy in NEED_SCORES and trace.scores is None:
            raise ValueError(f"trace.scores: got None, expected scores: {policy} goes by them")
    points = _points(slots, 1 if shared else trace.layers, shared)
    hits = np.zeros((len(points), trace.layers), dtype=np.int64)
    stalls = np.zeros_like(hits)
    requests = np.zeros(trace.layers, dtype=np.int64)
    for column in range(1 if shared else trace.layers):
        stream = shared_stream(trace) if shared else layer_stream(trace, column)
        layer = stream.layers[stream.step_of_request()]
        requests += np.bincount(layer, minlength=trace.layers)
        run = (
            _compiled(stream, policy, options)
            if isinstance(policy, str)
            else lambda slots, stream=stream: drive(stream, policy(slots))
        )
        for row, point in enumerate(points):
            hit = run(point[column])
            hits[row] += np.bincount(layer[hit], minlength=trace.layers)
            missed = np.unique(stream.step_of_request()[~hit])
            stalls[row] += np.bincount(stream.layers[missed], minlength=trace.layers)
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", "custom")
    labels = tuple(point[0] if len(set(point)) == 1 else point for point in points)
    return HitCurve(name, labels, hits, stalls, requests, trace.number_of_steps)


def gap_closed(lru: HitCurve, belady: HitCurve, policy: HitCurve) -> NDArray[np.float64]:
    """[p]: the share of the way from LRU to the bound that a policy goes; NaN where there is none.

    Raises:
        ValueError: the curves are of different slots or traces.
    """
    for name, curve in (("belady", belady), ("policy", policy)):
        if curve.slots != lru.slots:
            raise ValueError(f"{name}.slots: got {curve.slots}, expected {lru.slots} as of lru")
        if not np.array_equal(curve.requests, lru.requests):
            raise ValueError(
                f"{name}.requests: got {curve.requests.sum()}, expected {lru.requests.sum()} as of "
                "lru: another trace"
            )
    gap = belady.rate - lru.rate
    gain = policy.rate - lru.rate
    return np.divide(gain, gap, out=np.full_like(gap, np.nan), where=gap > 0)


def _points(slots: Any, layers: int, shared: bool) -> list[tuple[int, ...]]:
    """[p][l]"""
    each = slots if _is_list(slots) else [slots]
    if not each:
        raise ValueError("slots: got none, expected one number at least")
    points: list[tuple[int, ...]] = []
    for i, point in enumerate(each):
        if not _is_list(point):
            points.append((whole(f"slots[{i}]", point),) * layers)
            continue
        if len(point) != layers:
            want = "one number: the layers share" if shared else f"{layers}, one a layer"
            raise ValueError(f"slots[{i}]: got {len(point)} numbers, expected {want}")
        points.append(tuple(whole(f"slots[{i}][{j}]", x) for j, x in enumerate(point)))
    return points


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _compiled(
    stream: Stream, policy: Policy, options: dict[str, Any]
) -> Callable[[int], NDArray[np.bool_]]:
    """What runs a stream through the compiled twin of a policy, by the number of slots."""
    keys = stream.experts * (stream.trace.layers if stream.shared else 1)
    arguments: dict[str, Any] = {}
    # Made to have the options checked and their defaults filled in.
    rules = _make(stream, policy, 0, options)
    if isinstance(rules, LFU):
        arguments = {"remember": rules.remember, "halve_every": rules.halve_every or 0}
    elif isinstance(rules, MRS):
        arguments = {"alpha": rules.alpha, "scores": stream.recent(rules.keep, rules.reduction)}
    elif isinstance(rules, ExpectedReuse):
        arguments = {"scores": stream.logs()}
    elif isinstance(rules, Belady):
        arguments = {"next": stream.next_steps()}

    def run(slots: int) -> NDArray[np.bool_]:
        of_stream = (stream.keys, stream.offsets, stream.first_keys())
        hit = _core.moe.replay_cache(policy, min(slots, keys), keys, *of_stream, **arguments)
        return hit.view(np.bool_)

    return run


def hits(
    stream: Stream, policy: Policy, slots: int, options: dict[str, Any] | None = None
) -> NDArray[np.bool_]:
    """[n] whether each request hit, through the compiled policies."""
    return _compiled(stream, policy, options or {})(slots)


def replay_in_python(
    stream: Stream, policy: Policy, slots: int, options: dict[str, Any]
) -> NDArray[np.bool_]:
    """[n] whether each request hit, through the classes of `quernstone.moe.cache`."""
    return drive(stream, _make(stream, policy, slots, options))


def drive(stream: Stream, cache: ExpertCache) -> NDArray[np.bool_]:
    """[n] whether each request hit in a cache that is empty."""
    rows = None if stream.trace.scores is None else stream.rows()
    hit = np.zeros(len(stream.keys), dtype=np.bool_)
    starts = stream.offsets.tolist()
    for start, first, keys in zip(starts, stream.first_keys().tolist(), stream, strict=False):
        result = cache.step(keys, None if rows is None else next(rows), first=first)
        for key in result.hits:
            hit[start + keys.index(key)] = True
    return hit


def _make(stream: Stream, policy: Policy, slots: int, options: dict[str, Any]) -> ExpertCache:
    needs: dict[str, Any] = {"future": list(stream)} if policy == "belady" else {}
    if policy == "mrs":
        needs["top_k"] = stream.trace.top_k
    return make_cache(policy, slots, **(needs | options))
