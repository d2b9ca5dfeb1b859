"""A cache of keys and values that grows by doubling instead of being copied at every step.

Axes: b sequences, g key heads, s keys, d head width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_FIRST_CAPACITY = 256


class GrowingLayer(DynamicLayer):
    """A layer of `DynamicCache` whose `keys` and `values` are the begin of longer buffers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._arrays: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._seen: tuple[Tensor | None, Tensor | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has keys and values of its own: it may not write behind ours, nor elsewhere.
        return {**self.__dict__, "_buffers": None, "_arrays": None, "_seen": (None, None)}

    @classmethod
    def of(cls, layer: DynamicLayer) -> Self:
        """A layer with the keys and values of another."""
        made = cls()
        if layer.get_seq_length():
            assert layer.keys is not None
            assert layer.values is not None
            made.lazy_initialization(layer.keys, layer.values)
            made.keys, made.values = layer.keys, layer.values
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [b, g, t, d] of each; all of them, [b, g, s, d]."""
        past, tokens = self.get_seq_length(), key_states.shape[-2]
        keys, values = self.reserve(past, tokens, key_states, value_states)
        keys[:, :, past:].copy_(key_states)
        values[:, :, past:].copy_(value_states)
        return self.commit(past + tokens)

    def reserve(
        self, past: int, tokens: int, key_like: Tensor, value_like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values with room for more at their end; they count from `commit` on.

        Args:
            past: keys that are kept.
            tokens: keys to come.
            key_like, value_like: [b, g, ., d], of the shape and dtype to come.
        """
        end = past + tokens
        buffers = self._buffers
        # Whoever selects or crops puts another tensor in the place of ours.
        ours = past == 0 or (self.keys is self._seen[0] and self.values is self._seen[1])
        if (
            buffers is None
            or not ours
            or buffers[0].shape[2] < end
            or buffers[0].shape[:2] != key_like.shape[:2]
            or buffers[0].dtype != key_like.dtype
        ):
            capacity = max(2 * end, _FIRST_CAPACITY)
            made = [
                like.new_empty(*like.shape[:2], capacity, like.shape[3])
                for like in (key_like, value_like)
            ]
            if past:
                assert self.keys is not None
                assert self.values is not None
                made[0][:, :, :past].copy_(self.keys.detach())
                made[1][:, :, :past].copy_(self.values.detach())
            buffers = self._buffers = (made[0], made[1])
            self._arrays = None
        if not self.is_initialized:
            self.lazy_initialization(key_like, value_like)
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def arrays(self, past: int, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """[g, t, d] of the first sequence, what `reserve` has made room for; bf16 as int16."""
        assert self._buffers is not None
        if self._arrays is None:
            first, second = (
                (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()[0]
                for x in self._buffers
            )
            self._arrays = first, second
        keys, values = self._arrays
        return keys[:, past : past + tokens], values[:, past : past + tokens]

    def commit(self, end: int) -> tuple[Tensor, Tensor]:
        """The layer holds `end` keys from now on: these, and their values."""
        assert self._buffers is not None
        keys, values = (x[:, :, :end] for x in self._buffers)
        self.keys, self.values = self._seen = keys, values
        return keys, values


def adopted(cache: Any, layers: int) -> bool:
    """Whether a cache is of the kind that grows; its layers then become `GrowingLayer`."""
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if not cache.layers:
        cache.layers.extend(GrowingLayer() for _ in range(layers))
        return True
    if len(cache.layers) != layers:
        return False
    for i, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            continue
        if type(layer) is not DynamicLayer:
            return False
        cache.layers[i] = GrowingLayer.of(layer)
    return True
