"""Which tokens count for the importance of a head, and how many, without an S x S mask.

Axes: b batch, t queries, s keys.
"""

import torch
from torch import Tensor

from quernstone.attention.hf_mask import KeyMask
from quernstone.attention.types import Kind


def token_mask(
    mask: KeyMask, *, count_padding: bool = False, skip_first: int = 0, device: torch.device
) -> Tensor | None:
    """The `token_mask` of `sink_attention` for a layer with a given visibility.

    Args:
        mask: what the queries see.
        count_padding: let padding count where it sees a key.
        skip_first: leave out so many tokens at the start of each sequence. The first token of a
            causal sequence sees itself alone; kind "vanilla" never counts it.

    Returns:
        bool [b, t], or None where every token counts that sees a key.
    """
    causal = mask.causal
    # Keys of another sequence say nothing about which of the queries are padding.
    level = causal or mask.queries == mask.used
    tokens = mask.tokens() if level and not count_padding else None
    if not skip_first:
        return tokens
    offset = mask.used - mask.queries if causal else 0
    position = torch.arange(mask.queries, device=device) + offset
    start = mask.key_start if level and mask.key_start is not None else position.new_zeros(1)
    late = (position >= start[:, None] + skip_first).expand(mask.batch, mask.queries)
    return late if tokens is None else tokens & late


def counted_tokens(
    batch: int,
    queries: int,
    keys: int,
    *,
    kind: Kind = "sink",
    causal: bool = True,
    window: int | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    token_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The number of tokens that the importance of a `sink_attention` call is a mean over.

    Args:
        batch, queries, keys: b, t, s of the call.
        kind, causal, window, key_start, key_lengths, token_mask: as in the call.
        device: of the result.

    Returns:
        int64 scalar: the tokens of `token_mask` that see a key; of kind "vanilla" those that see
        a key other than the first.

    Source: the contract of `sink_attention`. Oracle: the mask of `reference.visible`.
    """
    position = torch.arange(queries, device=device) + keys - queries
    start = torch.zeros(1, dtype=torch.int64, device=device) if key_start is None else key_start
    start = start.to(torch.int64)[:, None]
    end = torch.full_like(start, keys) if key_lengths is None else key_lengths[:, None]
    first, last = start.expand(-1, queries), end.clamp(max=keys)
    if causal:
        last = torch.minimum(last, position + 1)
    if window is not None:
        first = torch.maximum(first, position - window + 1)
        if not causal:
            last = torch.minimum(last, position + window)
    visible = last - first
    if kind == "vanilla":
        visible = visible - (first == start).to(torch.int64)
    counted = (visible > 0).expand(batch, queries)
    if token_mask is not None:
        counted = counted & token_mask
    return counted.sum()
