"""The rows of experts on a CUDA device, made on the CPU: all but the device and its figures is the
same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quernstone.bench.gpu import moe
from quernstone.bench.rows import Row
from quernstone.moe import PRESETS, CostModel, Experts, ExpertsShape
from quernstone.moe.cuda_device import CudaDevice
from tests.moe.fake_streams import FakeBackend, FakeCall

SHAPE = ExpertsShape(8, 64, 64)
COSTS = CostModel.of_machine(PRESETS["a6000-xeon10"], SHAPE)
HYBRID = moe.HybridCase("tiny", "decode", 25, SHAPE, 2, 2)


class Immediate(FakeBackend):
    """Kernels that need no queue: what a clock times."""

    def synchronize(self) -> None:
        if self.queues:
            super().synchronize()


def machine(seed: int = 0, seconds: float = 100.0) -> moe.Machine:
    backend = Immediate(seed)

    def make(costs: CostModel) -> CudaDevice:
        return CudaDevice(costs=costs, pinning="given", backend=backend)

    return moe.Machine(backend, make, rounds=2, seconds=seconds, loads=(1, 4))


@pytest.fixture(autouse=True)
def assumed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "measured_costs", lambda *_, **__: COSTS)
    monkeypatch.setattr(moe, "_costs", _uncached)


def _uncached(*_: object) -> CostModel:
    return COSTS


_uncached.cache_clear = lambda: None  # type: ignore[attr-defined]


def row(case: moe.Case, on: moe.Machine | None = None) -> Row:
    (found,) = moe.measure([case], on or machine())
    return found


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_hybrid_row_has_every_baseline_and_the_outputs_of_the_cpu(phase: moe.Phase) -> None:
    found = row(replace(HYBRID, phase=phase))
    assert found.ours is not None
    assert found.error == 0.0 if phase == "decode" else found.error <= moe.TOLERANCE[phase]
    assert set(found.rivals) == {moe.FIXED, moe.ON_DEMAND, moe.ALL_CPU}
    assert all(rival.ratio is not None for rival in found.rivals.values())
    assert found.ratio == min(rival.ratio or 9.0 for rival in found.rivals.values())
    assert any("a device" in note or "expert" in note for note in found.notes)


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_a_kernel_row_compares_then_times(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels here all round activations to 8 bits.
    monkeypatch.setitem(moe.TOLERANCE, "grouped", 0.03)
    found = row(moe.KernelCase("tiny", tokens, SHAPE, 2))
    assert found.ours is not None
    assert found.error is not None
    assert 0 < found.error <= 0.03
    assert found.limit is not None
    assert found.limit.unit == ("GB/s" if tokens <= 8 else "TFLOP/s")
    assert found.work["bytes"] == 2 * SHAPE.expert_bytes
    assert found.rivals[moe.TORCH].ratio is not None


def test_a_transfer_is_timed_by_its_events() -> None:
    found = row(moe.BusCase("tiny", SHAPE))
    assert found.ours is not None
    assert found.work["rounds"] == 2
    assert found.limit is not None


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    down = FakeCall.down
    monkeypatch.setattr(FakeCall, "down", lambda self: 1.1 * down(self))
    for case in (HYBRID, moe.KernelCase("tiny", 1, SHAPE, 2)):
        found = row(case)
        assert found.ours is None
        assert "wrong" in found.notes[0]
        assert not moe.left_out(found)


def test_rows_without_time_are_left_out_and_say_so() -> None:
    found = row(HYBRID, machine(seconds=-1.0))
    assert found.ours is None
    assert moe.left_out(found)


def test_routing_is_that_of_trained_models_with_the_experts_of_each() -> None:
    for case in moe.cases():
        if isinstance(case, moe.HybridCase):
            trace = moe.routing(case.shape.count, case.top_k)
            assert trace.experts == case.shape.count
            assert trace.top_k == case.top_k
            (step, *_) = moe.steps(case, 1, torch.device("cpu"))
            assert len(step.ids) == case.layers <= 8
            assert step.x.shape == (1 if case.phase == "decode" else 128, case.shape.hidden)


def test_random_bytes_are_experts() -> None:
    shape = ExpertsShape(1, 48, 40)
    experts = Experts(shape, moe._layers(shape, 1, False)[0].data)
    for matrix, inputs in zip(experts.matrices(0), (48, 48, 40), strict=True):
        assert matrix.isfinite().all()
        assert 0.5 < float(matrix.std()) * inputs**0.5 < 1.5
    assert np.array_equal(moe.packed_bytes(shape, 0), experts.data)
