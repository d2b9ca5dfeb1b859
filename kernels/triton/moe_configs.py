"""Block sizes of the grouped experts: what runs on a chip for how many tokens of an expert.

Every row compiles without spilling registers, within the chip's shared memory and with its matrix
instructions, for each format. That is read from machine code (see `ahead_of_time_moe`); which row
is fast, only a GPU can tell.
"""

from typing import NamedTuple

from quernstone.kernels.triton.attention_configs import CHIPS, chip


class Config(NamedTuple):
    """One way to run both kernels."""

    block_t: int  # assignments a tile
    block_n: int  # outputs a program
    block_k: int  # inputs a step
    warps: int
    stages: int


_ALL = CHIPS
_BIG = (80, 90, 100)  # in shared memory

# By the tokens of an expert, with where they fit: steps of 32 inputs leave room for the weights as
# they are unpacked.
_TABLE: tuple[tuple[Config, tuple[int, ...]], ...] = (
    (Config(16, 64, 32, 4, 4), _ALL),
    (Config(32, 64, 32, 4, 4), _ALL),
    (Config(64, 64, 32, 4, 3), _BIG),
    (Config(64, 64, 32, 8, 3), (120,)),
    (Config(128, 64, 32, 8, 3), _BIG),
)


def candidates(capability: int) -> list[Config]:
    """Configurations for a compute capability (times ten), by rising tokens."""
    wanted = chip(capability)
    return [config for config, chips in _TABLE if wanted in chips]


def pick(most: int, capability: int) -> Config:
    """For a call whose busiest expert has `most` tokens."""
    found = candidates(capability)
    return next((config for config in found if most <= config.block_t), found[-1])
