"""A trace as a cache sees it: step after step, the keys that are needed at once.

Axes: n requests (a key that a step needs), s steps, e experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernstone.moe.cache.reuse import mean_over_tokens, uniform_shares
from quernstone.moe.cache.scored import Reduction, recent_scores, top_p
from quernstone.moe.trace import Trace


@dataclass(frozen=True, eq=False)
class Stream:
    """The requests of one cache."""

    keys: NDArray[np.int64]
    """[n], each key once in a step, in the order in which its tokens name them."""
    offsets: NDArray[np.int64]
    """[s + 1]: step i is keys[offsets[i]:offsets[i + 1]]."""
    layers: NDArray[np.int64]
    """[s] layer of each step."""
    experts: int
    shared: bool
    """Keys are layer * experts + expert and all layers take turns; else expert, of one layer."""
    trace: Trace

    def __iter__(self) -> Iterator[list[int]]:
        keys = self.keys.tolist()
        for start, end in pairwise(self.offsets.tolist()):
            yield keys[start:end]

    def first_keys(self) -> NDArray[np.int64]:
        """[s]: the key of the layer's expert 0."""
        return self.layers * self.experts if self.shared else np.zeros_like(self.layers)

    def rows(self) -> Iterator[NDArray[np.float64]]:
        """The scores of each step, [tokens of the step, e]."""
        scores = self._scores()
        ends = np.cumsum(np.bincount(self.trace.steps)).tolist()
        for start, end in pairwise((0, *ends)):
            for of_layer in scores:
                yield of_layer[start:end].astype(np.float64)

    def recent(self, keep: int, reduction: Reduction) -> NDArray[np.float64]:
        """[s, e]: what MRS makes of each step's scores."""
        if self.trace.number_of_steps == self.trace.tokens:
            return top_p(self._one_row_a_step(), keep)
        return np.stack([recent_scores(rows, keep, reduction) for rows in self.rows()])

    def logs(self) -> NDArray[np.float64]:
        """[s, e]: what ExpectedReuse makes of them."""
        if self.trace.number_of_steps == self.trace.tokens:
            shares = uniform_shares(self._one_row_a_step())
        else:
            shares = np.stack([uniform_shares(mean_over_tokens(rows)) for rows in self.rows()])
        # Row by row as the cache takes them: NumPy's logarithm of a longer array may be another.
        for row in shares:
            np.log(row, out=row)
        return shares

    def _scores(self) -> NDArray[Any]:
        """[l, t, e] of the layers in this stream."""
        if self.trace.scores is None:
            raise ValueError("trace.scores: got None, expected scores, which the policy goes by")
        return self.trace.scores[np.unique(self.layers)]

    def _one_row_a_step(self) -> NDArray[np.float64]:
        in_turn = self._scores().swapaxes(0, 1).reshape(-1, self.experts)
        return in_turn.astype(np.float64)

    def next_steps(self) -> NDArray[np.int64]:
        """[n]: the next step that needs the same key; the number of steps where there is none."""
        step = self.step_of_request()
        order = np.argsort(self.keys, kind="stable")
        following = np.full(len(self.keys), len(self.layers), dtype=np.int64)
        same = self.keys[order[1:]] == self.keys[order[:-1]]
        following[order[:-1][same]] = step[order[1:][same]]
        return following

    def step_of_request(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.layers)), np.diff(self.offsets))


def layer_stream(trace: Trace, layer: int) -> Stream:
    """The requests of one layer's own cache."""
    return _stream(trace, [layer], shared=False)


def shared_stream(trace: Trace) -> Stream:
    """The requests of a cache that all layers share, in the order in which the model runs."""
    return _stream(trace, list(range(trace.layers)), shared=True)


def _stream(trace: Trace, layers: list[int], *, shared: bool) -> Stream:
    ids = trace.ids[layers].astype(np.int64)  # [l, t, k]
    turn = trace.steps.astype(np.int64)[None, :, None] * len(layers)
    turn = np.broadcast_to(turn + np.arange(len(layers))[:, None, None], ids.shape)
    base = np.arange(len(layers))[:, None, None] * trace.experts if shared else np.int64(0)
    chosen = ids >= 0
    keys, step = (ids + base)[chosen], turn[chosen]
    # Of the same key in the same step the first one stays; a step's requests keep their order.
    _, first = np.unique(step * (len(layers) * trace.experts) + keys, return_index=True)
    first.sort()
    keys, step = keys[first], step[first]
    order = np.argsort(step, kind="stable")
    number = trace.number_of_steps * len(layers)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(step, minlength=number))))
    of_layers = np.tile(np.array(layers, dtype=np.int64), trace.number_of_steps)
    return Stream(keys[order], offsets.astype(np.int64), of_layers, trace.experts, shared, trace)
