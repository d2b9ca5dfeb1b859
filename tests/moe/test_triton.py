"""The grouped Triton kernels, interpreted: every format, odd extents, any number of tokens."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from quernstone.moe import ExpertsShape
from quernstone.moe.device_memory import Batch, to_device
from quernstone.moe.triton_experts import grouped_experts, matrix_bytes
from tests.moe import interpreted
from tests.moe.device_cases import DeviceCase

# Outputs and inputs around the blocks of 16 and the tiles, tokens around the tile, groups shorter
# and longer than a step.
CASES: list[tuple[DeviceCase, tuple[int, int, int]]] = [
    (DeviceCase(ExpertsShape(2, 32, 32, "int4", 32), (1, 2)), (16, 16, 32)),
    (DeviceCase(ExpertsShape(2, 40, 17, "int4", 32, True), (16, 3)), (16, 32, 64)),
    (DeviceCase(ExpertsShape(2, 66, 48, "int4", 64, True), (17,)), (16, 32, 32)),
    (DeviceCase(ExpertsShape(1, 70, 20, "int4", 64), (3,)), (16, 16, 128)),
    (DeviceCase(ExpertsShape(1, 130, 33, "int4", 128, True), (3,)), (32, 64, 64)),
    (DeviceCase(ExpertsShape(1, 48, 160, "int4", 128), (2,)), (16, 64, 32)),
    (DeviceCase(ExpertsShape(3, 48, 40, "int8", 0), (1, 33, 2)), (16, 64, 64)),
    (DeviceCase(ExpertsShape(1, 31, 65, "int8", 0), (4,)), (16, 32, 32)),
    (DeviceCase(ExpertsShape(2, 48, 40, "bf16", 0), (5, 1)), (16, 32, 32)),
    (DeviceCase(ExpertsShape(1, 33, 15, "bf16", 0), (2,)), (16, 16, 64)),
]
TOGETHER = DeviceCase(ExpertsShape(2, 40, 24, "int4", 32), (3, 18))

Ask = Callable[..., Future[Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Asks a process that interprets."""
    # Spawned: a child that was forked from a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=interpreted.begin) as pool:
        yield pool.submit


@pytest.mark.parametrize(("case", "blocks"), CASES, ids=str)
def test_is_the_reference(case: DeviceCase, blocks: tuple[int, int, int], ask: Ask) -> None:
    got, want = ask(interpreted.results, case, *blocks).result()
    assert got.shape == want.shape
    # Weights and the input of down are rounded to bf16 once each, by truncation in the interpreter:
    # up to 2^-7 each, and errors of many terms add up to less than their bound.
    assert float((got - want).norm() / want.norm()) <= 2 * 2**-7


def test_a_row_depends_on_its_own_token_alone(ask: Ask) -> None:
    alone, together = ask(interpreted.alone_and_together, TOGETHER).result()
    assert torch.equal(alone, together)


def test_a_nan_stays_with_its_token(ask: Ask) -> None:
    spoilt, expected = ask(interpreted.what_a_nan_reaches, TOGETHER).result()
    assert any(expected)
    assert spoilt == expected


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("sides", [(2048, 1408), (33, 47), (1, 1)])
@pytest.mark.parametrize(
    ("format", "group"), [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 0), ("bf16", 0)]
)
def test_blocks_are_as_large_as_the_core_says(
    format: Any, group: int, sides: tuple[int, int], zero_points: bool
) -> None:
    shape = ExpertsShape(1, *sides, format, group, zero_points and format == "int4")
    across, down = (matrix_bytes(shape, across=way) for way in (True, False))
    blocks = [-(-side // 16) for side in sides]
    total = 2 * across["BLOCK_BYTES"] * blocks[1] + down["BLOCK_BYTES"] * blocks[0]
    assert total == shape.expert_bytes


def test_tiles_hold_every_assignment_once() -> None:
    call = DeviceCase(ExpertsShape(4, 32, 32), (1, 16, 17, 40)).make()
    batch = Batch(*call.arguments, torch.float32)
    tiles = batch.tiles(16).tolist()
    seen = [(place, first + i) for place, first, count in tiles for i in range(count)]
    places = [place for place, count in enumerate(call.counts) for _ in range(count)]
    assert seen == list(zip(places, range(sum(call.counts)), strict=True))
    assert all(1 <= count <= 16 for _, _, count in tiles)


def test_tables_arrive_as_they_are() -> None:
    tables = [
        np.arange(3),
        np.arange(5, dtype=np.int32),
        np.arange(6, dtype=np.int32).reshape(2, 3),
    ]
    for got, want in zip(to_device(tables, torch.device("cpu")), tables, strict=True):
        assert torch.equal(got, torch.from_numpy(want))
        assert got.data_ptr() % 16 == 0


def test_a_call_without_tokens_queues_nothing() -> None:
    shape, data, *_ = DeviceCase(ExpertsShape(2, 64, 32), ()).make().arguments
    x, none = torch.zeros(0, 64, dtype=torch.bfloat16), np.zeros(0, np.int64)
    call = grouped_experts(shape, data, [], [], none, x)
    call.gate_up()
    assert call.down().shape == (0, 64)


def test_tokens_in_fp32_are_refused_by_name() -> None:
    call = DeviceCase(ExpertsShape(2, 64, 32), (1,)).make()
    with pytest.raises(TypeError, match=r"x\.dtype: got torch\.float32, expected torch\.bfloat16"):
        grouped_experts(*call.arguments)
