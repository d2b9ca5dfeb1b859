"""The Triton kernels as machine code for GPUs that are not here: compiled, not run on a GPU.

Registers, spills, shared memory and instructions are read; speed is not known. `make gpu-check`
looks at every configuration, these tests at those that matter most.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from quernstone.kernels.triton.attention_configs import CHIPS, Config, candidates, chip

# chip, kernel, dtype, width and what else there is to a call; the default configuration of each
CHOSEN: list[tuple[int, str, str, int, dict[str, Any]]] = [
    (90, "forward", "bf16", 64, {}),
    (90, "forward", "bf16", 128, {}),
    (90, "forward", "fp16", 256, {}),
    (90, "keys", "bf16", 64, {}),
    (90, "keys", "bf16", 128, {"dlse": True}),
    (90, "queries", "fp16", 128, {}),
    (90, "queries", "bf16", 256, {}),
    (90, "forward", "fp32", 128, {"kind": "vanilla"}),
    (80, "forward", "bf16", 128, {"kind": "vanilla", "windowed": True, "padded": True}),
    (80, "keys", "bf16", 128, {"kind": "vanilla", "windowed": True, "padded": True}),
    (80, "queries", "bf16", 128, {}),
    (80, "keys", "fp32", 128, {"dlse": True}),
    (100, "forward", "bf16", 128, {}),
    (100, "queries", "bf16", 64, {}),
    (120, "forward", "bf16", 256, {"kind": "gated by element"}),
    (120, "keys", "bf16", 128, {}),
    (120, "queries", "bf16", 256, {}),
]
# Sums that no thread's registers hold: without it, nobody would know that a spill is seen.
TOO_LARGE = (90, "queries", "bf16", 64, {"config": Config(64, 64, 1, 1)})


def begin(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def usage(chip: int, kernel: str, dtype: str, width: int, others: dict[str, Any]) -> Any:
    """What a build takes, and which promises it breaks."""
    from quernstone.kernels.triton import ahead_of_time

    bits = 32 if dtype == "fp32" else 16
    others = {
        "config": candidates(kernel, width, bits, chip, others.get("dlse", False))[0]
    } | others
    build = ahead_of_time.Build(kernel, dtype, width, **others)
    found = ahead_of_time.compile_for(build, chip)
    return found._asdict(), ahead_of_time.broken_promises(build, chip, found)


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


def test_a_spill_is_seen(usages: dict[str, Any]) -> None:
    found, broken = usages[str(TOO_LARGE)].result()
    assert found["spilled_bytes"] > 0
    assert any("spills" in words for words in broken)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
def test_every_chip_has_a_configuration(kernel: str, bits: int, width: int) -> None:
    for capability in CHIPS:
        found = candidates(kernel, width, bits, capability)
        assert found
        assert len(found) == len(set(found)) <= 4
        assert candidates(kernel, width, bits, capability, weighted=True)


def test_other_chips_take_what_suits_them() -> None:
    assert [chip(x) for x in (80, 86, 89, 90, 100, 103, 110, 120, 121)] == [
        *(80, 120, 120, 90, 100, 100, 100, 120, 120)
    ]
