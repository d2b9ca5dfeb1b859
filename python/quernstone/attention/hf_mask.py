"""The attention mask of a transformers model as a range of keys, instead of an S x S tensor.

Axes: b batch, t queries, s keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

# Every name below is one of transformers 5's `masking_utils`. Going by name keeps transformers
# from being imported with the package.
_MODULE = "transformers.masking_utils"
_HOLES = (
    "attention_mask: got a row in which a masked key lies between visible ones, expected padding "
    "on the left, on the right or on both sides"
)
_PACKED = (
    "position_ids: got packed sequences (positions that restart within a row), expected one "
    "sequence per row; pad them instead"
)


def refuse(what: str, instead: str = 'use attn_implementation="eager"') -> NoReturn:
    """Say what the "quernstone" attention does not do, and what does."""
    raise ValueError(f'attn_implementation="quernstone" does not support {what}; {instead}')


@dataclass(frozen=True, eq=False)
class KeyMask:
    """Which keys the queries see, in the terms of `sink_attention`.

    transformers hands it from the mask function to the attention function in the place of a
    mask tensor, and asks it for the shape such a tensor would have. It is no tensor, so that a
    model which adds its mask to the scores by itself fails at once.
    """

    batch: int
    queries: int
    keys: int
    """Length of the key tensor that the mask is for."""
    used: int
    """Keys to keep. Of a causal mask the last query stands at `used - 1`; what follows is the
    part of a static cache that is still empty."""
    causal: bool
    window: int | None = None
    key_start: Tensor | None = None
    """int64 [b], 0 where None."""
    key_lengths: Tensor | None = None
    """int64 [b], `used` where None."""

    ndim = 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.queries, self.keys))

    def contiguous(self) -> KeyMask:
        return self

    def to(self, *_args: object, **_kwargs: object) -> KeyMask:
        """Itself: `sink_attention` names a vector that is on another device than the queries."""
        return self

    def tokens(self) -> Tensor | None:
        """bool [b, t], the queries that are no padding; None when none of them is."""
        if self.key_start is None or self.key_lengths is None:
            return None
        # Without causality (an encoder) a query is level with the key of its own index.
        offset = self.used - self.queries if self.causal else 0
        position = torch.arange(self.queries, device=self.key_start.device) + offset
        return (position >= self.key_start[:, None]) & (position < self.key_lengths[:, None])

    @classmethod
    def __torch_function__(cls, func: Any, *_args: object, **_kwargs: object) -> NoReturn:
        refuse(f"a model that applies its mask outside the attention interface ({func.__name__})")


@dataclass(frozen=True)
class _Pattern:
    """What one of transformers' mask functions says of a query at q and a key at k."""

    causal: bool = False  # k <= q
    behind: int | None = None  # k > q - behind
    around: int | None = None  # |q - k| <= around

    def __and__(self, other: _Pattern) -> _Pattern:
        return _Pattern(
            self.causal or other.causal,
            _smaller(self.behind, other.behind),
            _smaller(self.around, other.around),
        )

    def window(self) -> int | None:
        """The two limits as the `window` of `sink_attention`."""
        if self.behind is not None and not self.causal:
            refuse("a window behind the query without causality")
        return _smaller(self.behind, None if self.around is None else self.around + 1)


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | KeyMask | None = None,
    **_unused: object,
) -> KeyMask:
    """The mask function that `register_with_transformers` registers.

    Args:
        batch_size, q_length, kv_length: b, t, s of the mask.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: transformers' function of (batch, head, query, key) positions.
        attention_mask: bool [b, >= 0] over the positions from 0 on, false for padding; positions
            after its end are padding too. A `KeyMask` that `generate` made beforehand.

    Raises:
        ValueError: the pattern is no range of keys per sequence plus causality and window:
            packed sequences, mask functions of the user, chunks shorter than the keys,
            padding between tokens, queries that run ahead of the keys.

    Source: transformers 5.23, `masking_utils.sdpa_mask` (the arguments and their meaning).
    """
    # A static cache counts its tokens in a tensor.
    ahead = int(q_offset) - kv_offset
    # No key after the last query's position is seen, wherever it comes from.
    level = ahead + q_length
    pattern = _read(mask_function, end=kv_offset + level)
    window = pattern.window()
    if isinstance(attention_mask, KeyMask):
        made = attention_mask
        now = (batch_size, q_length, kv_length, pattern.causal, window)
        if (made.batch, made.queries, made.keys, made.causal, made.window) != now:
            refuse(f"a mask made for {made}, where the model needs {now}")
        return made
    if pattern.causal:
        if not 0 <= level <= kv_length:
            refuse(f"queries that end at key {level} of {kv_length} (the cache's query offset)")
    elif window is not None and level != kv_length:
        refuse(f"a bidirectional window with {q_length} queries and {kv_length} keys")
    used = level if pattern.causal else kv_length
    start, lengths = None, None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
            shape = tuple(attention_mask.shape)
            refuse(f"an attention_mask of shape {shape}, only [{batch_size}, keys]")
        start, lengths = key_range(attention_mask[:, kv_offset : kv_offset + used], used)
    return KeyMask(batch_size, q_length, kv_length, used, pattern.causal, window, start, lengths)


def key_range(visible: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """First visible key and end of the visible keys, int64 [b] each; None, None when all are.

    Args:
        visible: bool [b, <= keys]; keys that it does not reach are not visible.
    """
    tracing = torch.compiler.is_compiling()
    if not tracing and visible.shape[1] == keys and bool(visible.all()):
        return None, None
    if visible.shape[1] == 0:
        nothing = torch.zeros(visible.shape[0], dtype=torch.int64, device=visible.device)
        return nothing, nothing
    ones = visible.to(torch.int64)
    count = ones.sum(1)
    start = ones.argmax(1)
    end = torch.where(count > 0, visible.shape[1] - ones.flip(1).argmax(1), 0)
    _require((end - start == count).all(), _HOLES)
    return start, end


def _require(condition: Tensor, message: str) -> None:
    """Raise unless true; in a graph that is being traced, raise when the graph runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _read(function: Callable[..., Any] | None, *, end: int) -> _Pattern:
    """The pattern of a function that transformers composed; `end` is the last position plus 1."""
    name = getattr(function, "__qualname__", "")
    if function is None or getattr(function, "__module__", "") != _MODULE:
        refuse("mask functions of the user (or_mask_function, and_mask_function)")
    match name.partition(".")[0]:
        case "causal_mask_function":
            return _Pattern(causal=True)
        case "bidirectional_mask_function":
            return _Pattern()
        case "sliding_window_overlay":
            return _Pattern(behind=_captured(function)["sliding_window"])
        case "sliding_window_bidirectional_overlay":
            return _Pattern(around=_captured(function)["sliding_window"])
        case "and_masks":
            pattern = _Pattern()
            for part in _captured(function)["mask_functions"]:
                pattern = pattern & _read(part, end=end)
            return pattern
        case "chunked_overlay":
            captured = _captured(function)
            # Chunks count from the first token, so a sequence within the first one is whole.
            if end - int(captured["left_padding"].min()) <= captured["chunk_size"]:
                return _Pattern()
            refuse(f"chunked attention over {end} keys, only up to {captured['chunk_size']}")
        case "packed_sequence_mask_function":
            # A model that is being compiled or exported passes it for whole sequences as well.
            _require((_captured(function)["packed_sequence_mask"] == 0).all(), _PACKED)
            return _Pattern()
        case "remap_positions_for_packed_sequence":
            # Of whole sequences the positions count from another start, which shifts nothing.
            return _read(_captured(function)["mask_function"], end=end)
        case "blockwise_overlay" | "or_masks":
            refuse("unions of masks (block_sequence_ids, or_mask_function)")
        case _:
            refuse(f"the mask function {name}")


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return dict(
        zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
