"""Block sizes of the grouped experts: what runs on a chip for how many tokens of an expert.

Every row compiles without spilling registers, within the chip's shared memory and with its matrix
instructions, for each format. That is read from machine code (see `ahead_of_time_moe`); which row is
fast, only a GPU can tell.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """One way to run both kernels."""

    block_t: int  # assignments a tile
    block_n: int  # outputs a program
    block_k: int  # inputs a step
    warps: int
    stages: int


# Tokens of an expert -> configuration: the first that holds them, else the last.
_TABLE = (
    Config(16, 64, 32, 4, 4),
    Config(32, 64, 32, 4, 4),
    Config(64, 64, 32, 4, 3),
    Config(128, 64, 32, 8, 3),
)


def candidates() -> tuple[Config, ...]:
    return _TABLE


def pick(most: int) -> Config:
    """For a call whose busiest expert has `most` tokens."""
    return next((config for config in _TABLE if most <= config.block_t), _TABLE[-1])
