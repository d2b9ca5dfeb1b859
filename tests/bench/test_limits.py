"""The limits: buffers, what memory allows, and which product of matrices is the faster."""

import ctypes

import pytest
import torch

from quernstone.bench import limits, machine
from quernstone.bench.harness import Limit

SMALL = 4 << 20


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_affordable", lambda _buffers: SMALL)


@pytest.mark.parametrize("page", limits.PAGES)
def test_a_buffer_is_aligned_and_writable_to_its_end(page: str) -> None:
    with limits.buffer(SMALL, page) as address:
        assert address % limits.HUGE_PAGE == 0
        last = ctypes.c_ubyte.from_address(address + SMALL - 1)
        assert last.value == 1
        last.value = 7


@pytest.mark.parametrize("sweep", [limits.read_bandwidth, limits.copy_bandwidth])
@pytest.mark.usefixtures("small_buffers")
def test_bandwidth_is_the_best_of_the_settings(sweep: object) -> None:
    best = sweep(quick=True)  # type: ignore[operator]
    assert best.rate.p20 <= best.rate.median <= best.rate.p80
    assert 1e8 < best.rate.median < 1e13
    assert best.page in limits.PAGES
    assert best.page in best.words()


def test_buffers_shrink_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 64 << 30)
    assert limits._affordable(2) == limits.GIB
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 30)
    assert limits._affordable(1) == limits.GIB // 2
    monkeypatch.setattr(machine, "available_bytes", lambda: 0)
    assert limits._affordable(2) == limits.GIB // 16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_matmul_counts_its_operations(dtype: str) -> None:
    limit = limits.matmul(dtype)
    assert limit.work == 2 * 1024**3
    assert dtype in limit.name


def test_the_limit_of_a_slow_type_is_the_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"bf16": 0.02, "fp32": 0.001}
    made = {name: Limit(name, lambda: None, 1.0) for name in seconds}
    timing = {limit.run: seconds[name] for name, limit in made.items()}
    monkeypatch.setattr(limits, "matmul", made.__getitem__)
    monkeypatch.setattr(limits, "warm_seconds", timing.__getitem__)
    assert limits.arithmetic("bf16") is made["fp32"]
    timing[made["bf16"].run] = 0.0001
    assert limits.arithmetic("bf16") is made["bf16"]
    assert limits.arithmetic("fp32") is made["fp32"]


def test_description_names_what_a_figure_depends_on() -> None:
    about = machine.describe()
    assert about["versions"]["torch"] == torch.__version__
    assert about["isa"] in about["isas"]
    assert about["build"]
    assert about["cpu"]
