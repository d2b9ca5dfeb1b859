"""Block sizes of the attention kernels: what the autotuner may try, and what runs without it.

Axes: t queries, s keys, d head width.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """One way to run a kernel."""

    block_t: int
    block_s: int
    warps: int
    stages: int


class Chip(NamedTuple):
    """A compute capability, and the shared memory that one program may have on it."""

    capability: int
    shared_bytes: int


CHIPS = (
    Chip(80, 163 * 1024),
    Chip(90, 227 * 1024),
    Chip(100, 227 * 1024),
    Chip(120, 99 * 1024),
)

PASSES = ("forward", "keys", "queries")


def candidates(kernel: str, width: int, bits: int) -> list[Config]:
    if bits == 32:
        return [Config(32, 32, 4, 1)]
    return [Config(64, 64, 4, 2)]


def default(kernel: str, width: int, bits: int) -> Config:
    return candidates(kernel, width, bits)[0]
