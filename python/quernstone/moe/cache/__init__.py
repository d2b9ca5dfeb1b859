"""Caches of experts, one policy each behind one interface."""

from quernstone.moe.cache.base import ExpertCache, Insertion, StepResult
from quernstone.moe.cache.belady import Belady
from quernstone.moe.cache.lists import ARC, LRU, S3FIFO
from quernstone.moe.cache.policies import NEED_SCORES, POLICIES, Policy, make_cache
from quernstone.moe.cache.reuse import ExpectedReuse
from quernstone.moe.cache.scored import LFRU, LFU, MRS

__all__ = [
    "ARC",
    "LFRU",
    "LFU",
    "LRU",
    "MRS",
    "NEED_SCORES",
    "POLICIES",
    "S3FIFO",
    "Belady",
    "ExpectedReuse",
    "ExpertCache",
    "Insertion",
    "Policy",
    "StepResult",
    "make_cache",
]
