"""LRU, ARC, LFU and S3-FIFO against libcachesim, hit for hit.

It evicts request by request, whatever a step still needs, so the steps here have one key.
"""

import libcachesim
import numpy as np
import pytest

from quernstone.moe.cache import Policy, make_cache

from .routing import ar1_trace


def hits_of_libcachesim(name: str, slots: int, requests: list[int]) -> list[bool]:
    cache = getattr(libcachesim, name)(slots)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = []
    for key in requests:
        request.obj_id = key
        hits.append(cache.get(request))
    return hits


def hits_of_ours(policy: Policy, slots: int, requests: list[int], **options: object) -> list[bool]:
    cache = make_cache(policy, slots, **options)
    return [bool(cache.step([key]).hits) for key in requests]


def requests() -> dict[str, list[int]]:
    """Skewed, uniform, scanning and drifting ones, and those of a router one by one."""
    rng = np.random.default_rng(0)
    skewed = (rng.pareto(0.7, 4000).astype(np.int64) % 64).tolist()
    uniform = rng.integers(0, 64, 2000).tolist()
    scan = [i % 40 for i in range(2000)]
    drift = (rng.integers(0, 24, 4000) + np.arange(4000) // 100).tolist()
    router = ar1_trace(1, tokens=700).ids[0].astype(int).ravel().tolist()
    return {
        "skewed": skewed,
        "mixed": skewed[:2000] + scan[:500] + uniform[:1500] + skewed[2000:],
        "drift": drift,
        "router": router,
    }


REQUESTS = requests()


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("workload", REQUESTS)
@pytest.mark.parametrize(
    ("policy", "options", "theirs"),
    [("lru", {}, "LRU"), ("arc", {}, "ARC"), ("lfu", {"remember": False}, "LFU")],
)
def test_hits_are_those_of_libcachesim(
    policy: Policy, options: dict[str, object], theirs: str, workload: str, slots: int
) -> None:
    got = hits_of_ours(policy, slots, REQUESTS[workload], **options)
    assert got == hits_of_libcachesim(theirs, slots, REQUESTS[workload])


@pytest.mark.parametrize("slots", [20, 25, 32, 39, 40, 64, 70])
@pytest.mark.parametrize("workload", REQUESTS)
def test_s3fifo_hits_are_those_of_libcachesim_where_its_small_queue_takes_anything(
    workload: str, slots: int
) -> None:
    """Below 20 slots its small queue is one object long and refuses objects of that size."""
    got = hits_of_ours("s3fifo", slots, REQUESTS[workload])
    assert got == hits_of_libcachesim("S3FIFO", slots, REQUESTS[workload])
