"""The policies by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from quernstone.moe.cache.base import ExpertCache
from quernstone.moe.cache.belady import Belady
from quernstone.moe.cache.lists import ARC, LRU, S3FIFO
from quernstone.moe.cache.reuse import ExpectedReuse
from quernstone.moe.cache.scored import LFRU, LFU, MRS

Policy = Literal["lru", "lfu", "lfru", "s3fifo", "arc", "mrs", "reuse", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
NEED_SCORES: frozenset[Policy] = frozenset(("mrs", "reuse"))

_PLAIN: dict[str, type[ExpertCache]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "s3fifo": S3FIFO,
    "arc": ARC,
    "reuse": ExpectedReuse,
}


def make_cache(
    policy: Policy,
    slots: int,
    *,
    top_k: int | None = None,
    future: Sequence[Iterable[int]] | None = None,
    **options: Any,
) -> ExpertCache:
    """A cache by the name of its policy.

    Args:
        policy: "lru", "lfu", "lfru", "s3fifo", "arc", "mrs", "reuse" (`ExpectedReuse`) or "belady".
        slots: how many experts fit.
        top_k: experts of a token; "mrs" needs it.
        future: the keys of every step to come; "belady" needs it.
        options: of the policy, by the names that its class gives them.

    Raises:
        ValueError: the policy is unknown, or something it needs is missing.
    """
    check_policy(policy)
    if policy == "mrs":
        if top_k is None:
            raise ValueError("top_k: got None, expected the experts of a token: mrs needs it")
        return MRS(slots, top_k=top_k, **options)
    if policy == "belady":
        if future is None:
            raise ValueError("future: got None, expected the steps to come: belady needs them")
        return Belady(slots, future, **options)
    return _PLAIN[policy](slots, **options)


def check_policy(policy: object) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
