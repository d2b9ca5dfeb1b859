"""Block sizes of the attention kernels: what the autotuner may try on a chip, and what runs first.

Every row compiles without spilling registers and within the chip's shared memory on the chips that
it names, for each kind and mask (widths above 128: but for the backward pass). That is read from
machine code (see `ahead_of_time`); which row is fast, only a GPU can tell.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """One way to run a kernel."""

    block_t: int  # queries a block
    block_s: int  # keys a block
    warps: int
    stages: int


# Shared memory that one program may have, by chip: compute capability times ten.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CHIPS = tuple(SHARED_BYTES)
KERNELS = ("forward", "keys", "queries")
WIDTHS = (64, 128, 256)

_ALL = CHIPS
_BIG = (80, 90, 100)  # in shared memory
_NEW = (90, 100)

# (kernel, padded width, bits of a number) -> configurations and where they fit; best guess first.
_TABLE: dict[tuple[str, int, int], tuple[tuple[Config, tuple[int, ...]], ...]] = {
    ("forward", 64, 16): (
        (Config(128, 64, 8, 3), _ALL),
        (Config(64, 64, 4, 3), _NEW),
        (Config(128, 32, 8, 3), _ALL),
    ),
    ("forward", 128, 16): (
        (Config(128, 64, 8, 3), (90,)),
        (Config(128, 32, 8, 2), _BIG),
        (Config(64, 64, 8, 2), _ALL),
    ),
    ("forward", 256, 16): ((Config(64, 32, 8, 2), _ALL),),
    ("keys", 64, 16): (
        (Config(64, 64, 8, 2), (90, 100, 120)),
        (Config(32, 128, 8, 2), _ALL),
        (Config(32, 64, 4, 2), _ALL),
    ),
    ("keys", 128, 16): (
        (Config(32, 128, 8, 2), (90,)),
        (Config(64, 64, 8, 2), (80, 100)),
        (Config(32, 64, 8, 2), _ALL),
    ),
    ("keys", 256, 16): (
        (Config(32, 64, 8, 2), _NEW),
        (Config(32, 32, 8, 2), (80, 100, 120)),
    ),
    ("queries", 64, 16): (
        (Config(128, 64, 8, 2), _ALL),
        (Config(64, 64, 4, 2), _ALL),
    ),
    ("queries", 128, 16): (
        (Config(128, 64, 8, 2), _NEW),
        (Config(64, 64, 8, 2), _ALL),
        (Config(64, 32, 4, 2), _ALL),
    ),
    ("queries", 256, 16): (
        (Config(64, 32, 8, 2), _BIG),
        (Config(32, 32, 8, 2), (80, 100, 120)),
    ),
    ("forward", 64, 32): (
        (Config(64, 32, 8, 1), (80, 90, 120)),
        (Config(32, 32, 8, 1), _ALL),
    ),
    ("forward", 128, 32): ((Config(32, 32, 8, 1), _ALL),),
    ("forward", 256, 32): (
        (Config(16, 32, 8, 1), (80,)),
        (Config(16, 16, 8, 2), (100,)),
        (Config(16, 16, 8, 1), (90, 120)),
    ),
    ("keys", 64, 32): (
        (Config(32, 32, 8, 1), (90, 100)),
        (Config(16, 32, 8, 2), (120,)),
        (Config(16, 32, 4, 1), (80, 90, 100)),
    ),
    ("keys", 128, 32): (
        (Config(16, 32, 8, 2), (80, 100, 120)),
        (Config(16, 16, 8, 2), (90,)),
    ),
    ("keys", 256, 32): ((Config(16, 16, 8, 1), _ALL),),
    ("queries", 64, 32): ((Config(32, 32, 8, 1), _ALL),),
    ("queries", 128, 32): ((Config(32, 32, 8, 1), _ALL),),
    ("queries", 256, 32): ((Config(16, 32, 8, 1), _ALL),),
}


# Where the default has no register left for the weight of a row.
_UNWEIGHTED = {("keys", 128, 16, 90)}


def chip(capability: int) -> int:
    """The chip whose configurations suit a compute capability (times ten)."""
    if capability in (80, 87):
        return 80
    if 90 <= capability < 120:
        return 90 if capability < 100 else 100
    # 86 and 89 have the instructions of 80 and the shared memory of 120.
    return 120


def candidates(
    kernel: str, width: int, bits: int, capability: int, weighted: bool = False
) -> list[Config]:
    """Configurations of a kernel ("forward", "keys" or "queries"), the default first.

    `weighted` says whether the backward pass keeps the gates of rows apart from their exponents.
    """
    rows = _TABLE[kernel, max(width, WIDTHS[0]), bits]
    wanted = chip(capability)
    found = [config for config, chips in rows if wanted in chips]
    if weighted and (kernel, width, bits, wanted) in _UNWEIGHTED:
        return found[1:]
    return found


def rows_block(width: int) -> int:
    """Queries of a program of the rows kernel: it holds up to four tensors of that many rows."""
    return max(16, 4096 // width)
