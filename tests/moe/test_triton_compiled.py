"""The grouped kernels as machine code for GPUs that are not here: compiled, not run on a GPU.

Registers, spills, shared memory and instructions are read; speed is not known. `make gpu-check`
looks at every configuration, these tests at those with the least room on each chip.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from quernstone.kernels.triton.attention_configs import CHIPS
from quernstone.kernels.triton.moe_configs import Config, candidates, pick

# chip, kernel, bits, group, zero points, configuration by number
CHOSEN = [
    (80, "gate_up", 4, 64, True, 2),
    (80, "down", 4, 128, True, 3),
    (90, "gate_up", 4, 32, False, 0),
    (90, "gate_up", 4, 32, True, 3),
    (90, "down", 8, 0, False, 3),
    (100, "gate_up", 4, 32, True, 2),
    (100, "down", 16, 0, False, 0),
    (120, "gate_up", 4, 32, True, 2),
    (120, "down", 8, 0, False, 2),
]
# Sums that no thread's registers hold: without it, nobody would know that a spill is seen.
TOO_LARGE = (80, "gate_up", 4, 64, True, Config(128, 128, 64, 4, 2))


def begin(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def usage(
    chip: int, kernel: str, bits: int, group: int, zeros: bool, config: int | Config
) -> tuple[dict[str, Any], list[str]]:
    """What a build takes, and which promises it breaks."""
    from quernstone.kernels.triton import ahead_of_time_moe

    chosen = candidates(chip)[config] if isinstance(config, int) else config
    build = ahead_of_time_moe.Build(kernel, bits, chosen, group, zeros)
    found = ahead_of_time_moe.compile_for(build, chip)
    return found._asdict(), ahead_of_time_moe.broken_promises(chip, found)


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    cache = str(tmp_path_factory.mktemp("cache"))
    with ProcessPoolExecutor(2, context, initializer=begin, initargs=(cache,)) as pool:
        asked = {str(case): pool.submit(usage, *case) for case in (TOO_LARGE, *CHOSEN)}
        yield asked
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_keeps_its_promises(case: tuple[Any, ...], usages: dict[str, Any]) -> None:
    found, broken = usages[str(case)].result()
    assert not broken
    assert 0 < found["registers"] <= 255
    assert found["shared_bytes"] > 0
    assert found["matrix"]


def test_a_spill_is_seen(usages: dict[str, Any]) -> None:
    found, broken = usages[str(TOO_LARGE)].result()
    assert found["spilled_bytes"] > 0
    assert any("spills" in words for words in broken)


def test_every_chip_has_a_configuration_for_any_load() -> None:
    for chip in CHIPS:
        found = candidates(chip)
        assert len(found) == len(set(found)) >= 3
        assert [c.block_t for c in found] == sorted({c.block_t for c in found})
        for most in (1, 16, 17, 64, 65, 10_000):
            config = pick(most, chip)
            assert config in found
            assert config.block_t >= most or config == found[-1]
