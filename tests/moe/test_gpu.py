"""Experts on a real GPU, against the reference and the CPU's bits: `make gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernstone import _cuda
from quernstone.moe import Experts, ExpertsShape, Runtime
from quernstone.moe.cost import PRESETS, CostModel
from quernstone.moe.cuda_device import FEW, CudaDevice
from quernstone.moe.cuda_experts import few_tokens
from quernstone.moe.devices import Work
from quernstone.moe.triton_experts import grouped_experts

from .device_cases import FEW_TOKENS, Call, DeviceCase

pytestmark = pytest.mark.gpu

needs_library = pytest.mark.skipif(not _cuda.available(), reason="built without nvcc")

GROUPED = [
    DeviceCase(ExpertsShape(3, 256, 192, *kind), counts, tokens=300)
    for kind in (("int4", 32), ("int4", 64, True), ("int4", 128), ("int8", 0), ("bf16", 0))
    for counts in ((1, 2, 3), (17, 1, 40), (200, 5))
] + [
    DeviceCase(ExpertsShape(2, 130, 33, "int4", 64, True), (20, 3)),
    DeviceCase(ExpertsShape(2, 2048, 1408, "int4", 32), (70, 9), tokens=80),
]


@needs_library
@pytest.mark.parametrize("case", FEW_TOKENS, ids=str)
def test_few_tokens_have_the_bits_of_the_cpu(case: DeviceCase) -> None:
    call = case.make()
    want = call.on_the_cpu()
    shape, data, offsets, counts, rows, x = call.arguments
    for _ in range(2):
        made = few_tokens(shape, data.cuda(), offsets, counts, rows, x.cuda())
        made.gate_up()
        got = made.down().cpu()
        assert torch.equal(got.nan_to_num(nan=77.0), want.nan_to_num(nan=77.0))


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_experts_are_the_reference(case: DeviceCase) -> None:
    call = case.make()
    narrow = call.x.bfloat16()
    want = Call(call.experts, call.counts, narrow.float(), call.tokens).expected()
    shape, data, offsets, counts, rows, _ = call.arguments
    found = []
    for _ in range(2):
        made = grouped_experts(shape, data.cuda(), offsets, counts, rows, narrow.cuda())
        made.gate_up()
        found.append(made.down().cpu())
    # Weights and the input of down are rounded to bf16 once each.
    assert float((found[0] - want).norm() / want.norm()) <= 2 * 2**-8
    assert torch.equal(*found)


SHAPE = ExpertsShape(8, 128, 96)


def layers(count: int = 2) -> list[Experts]:
    made = [DeviceCase(SHAPE, (), seed=seed).make().experts for seed in range(count)]
    assert all(experts.shape == SHAPE for experts in made)
    return made


@needs_library
@pytest.mark.parametrize("pinning", ["register", "bounce"])
def test_a_device_computes_what_was_loaded_while_more_is_loaded(pinning: str) -> None:
    of = layers()
    costs = CostModel.of_machine(PRESETS["h100"], SHAPE)
    device = CudaDevice(pinning=pinning, costs=costs)  # type: ignore[arg-type]
    device.open(of, (3, 2), 2, reproducible=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, SHAPE.hidden, generator=generator)
    rng = np.random.default_rng(0)
    for _ in range(50):
        layer = int(rng.integers(2))
        work = []
        want = []
        device.begin()
        for slot in (0, 1, -1, -2):
            expert = int(rng.integers(SHAPE.count))
            rows = np.sort(rng.permutation(len(x))[: rng.integers(1, FEW)])
            device.load(layer, expert, slot)
            work.append(Work(expert, slot, rows))
            ids = torch.full((len(rows), 1), expert)
            want.append(of[layer](x[torch.from_numpy(rows)], ids, torch.ones(ids.shape)))
        device.compute(layer, x, work)
        device.load(layer, int(rng.integers(SHAPE.count)), 0)
        assert torch.equal(device.collect(), torch.cat(want))
    spans = device.times()
    assert {resource for resource, *_ in spans} == {"gpu", "pcie"}
    assert all(begin <= end for _, begin, end, _, _ in spans)
    device.close()
    device.close()


@needs_library
def test_a_runtime_has_the_bits_of_the_cpu_alone() -> None:
    named = {str(i): of for i, of in enumerate(layers())}
    generator = torch.Generator().manual_seed(1)
    for reproducible, tokens in ((False, 4), (True, 40)):
        costs = CostModel.of_machine(PRESETS["h100"], SHAPE)
        with Runtime(
            named, CudaDevice(costs=costs), slots=3, cache="lru", reproducible=reproducible
        ) as runtime:
            for step in range(20):
                x = torch.randn(tokens, SHAPE.hidden, generator=generator)
                ids = torch.rand(tokens, SHAPE.count, generator=generator).topk(2).indices
                weights = torch.rand(tokens, 2, generator=generator)
                name = str(step % 2)
                want = named[name](x, ids, weights)
                assert torch.equal(runtime.layer(name)(x, ids, weights), want)
                there = runtime.layer(name)(x.cuda(), ids.cuda(), weights.cuda())
                assert there.is_cuda
                assert torch.equal(there.cpu(), want)


def test_more_slots_than_memory_is_a_memory_error() -> None:
    shape = ExpertsShape(64, 2048, 1408)
    experts = Experts.empty(shape)
    device = CudaDevice(pinning="bounce")
    with pytest.raises(MemoryError, match=r"slots: got \d+ bytes, expected at most \d+ bytes"):
        device.open([experts] * 4096, [64] * 4096, 0, reproducible=False)
    device.close()
