"""The device of a CUDA GPU on queues that run in any order the waits allow: what is read when."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernstone.moe import Experts, ExpertsShape, Runtime, cuda_device
from quernstone.moe.cost import PRESETS, CostModel
from quernstone.moe.cuda_device import FEW, CudaDevice, first_tile, measured_costs
from quernstone.moe.devices import Device, Work
from tests.moe.fake_streams import FakeBackend, Order

SHAPE = ExpertsShape(6, 32, 48)
SLOTS, STAGING = (3, 2), 2


def layers(shape: ExpertsShape = SHAPE) -> list[Experts]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in SLOTS:
        wide = torch.randn(shape.count, 2 * shape.intermediate, shape.hidden, generator=generator)
        narrow = torch.randn(shape.count, shape.hidden, shape.intermediate, generator=generator)
        found.append(Experts.pack(wide / 4, narrow / 4, format=shape.format, group=shape.group))
    return found


LAYERS = layers()
X = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))


def opened(
    seed: int = 0, order: Order = "random", **options: Any
) -> tuple[CudaDevice, FakeBackend]:
    backend = FakeBackend(seed, order=order)
    device = CudaDevice(backend=backend, costs=costs(), **options)
    device.open(LAYERS, SLOTS, STAGING, reproducible=False)
    return device, backend


def costs() -> CostModel:
    return CostModel.of_machine(PRESETS["a6000-xeon10"], SHAPE)


# The layer whose expert a slot of all layers holds.
OF_LAYER: dict[int, int] = {}


def expected(layer: int, x: Tensor, work: list[Work]) -> Tensor:
    rows = []
    for one in work:
        ids = torch.full((len(one.tokens), 1), one.expert)
        mine = x[torch.from_numpy(one.tokens)]
        if len(one.tokens) > FEW:
            mine = mine.bfloat16().float()
        rows.append(LAYERS[layer](mine, ids, torch.ones(ids.shape)))
    return torch.cat(rows) if rows else torch.empty(0, 32)


def tokens(rng: random.Random, most: int = 6) -> np.ndarray:
    return np.array(sorted(rng.sample(range(len(X)), rng.randint(1, most))))


def test_it_is_a_device() -> None:
    device, _ = opened()
    assert isinstance(device, Device)
    assert not device.emulated
    assert device.name == "a fake device"


@pytest.mark.parametrize("pinning", ["register", "bounce"])
@pytest.mark.parametrize("order", ["random", "first", "last"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_runs_when_every_row_is_of_the_expert_that_was_loaded(
    seed: int, order: Order, pinning: Any
) -> None:
    rng = random.Random(seed)
    device, backend = opened(seed, order, pinning=pinning, in_flight=rng.randint(1, 3))
    held: dict[tuple[int, int], int] = {}
    before: dict[tuple[int, int], int | None] = {}
    for _ in range(10):
        device.begin()
        want, layer = [], rng.randrange(2)
        x = X * rng.random()
        for _ in range(rng.randint(0, 6)):
            slot = rng.randrange(-STAGING, SLOTS[layer])
            place = (layer, slot) if slot >= 0 else (-1, slot)
            action = rng.random()
            if action < 0.5:
                expert = rng.randrange(SHAPE.count)
                before[place] = held.get(place)
                held[place] = expert
                device.load(layer, expert, slot)
                if slot < 0:
                    OF_LAYER[slot] = layer
            elif action < 0.6 and place in before and slot >= 0:
                if device.cancel(layer, slot):
                    old = before.pop(place)
                    held.pop(place)
                    if old is not None:
                        held[place] = old
            elif place in held and (slot >= 0 or OF_LAYER[slot] == layer):
                before.pop(place, None)
                work = [Work(held[place], slot, tokens(rng))]
                device.compute(layer, x, work)
                want.append(expected(layer, x, work))
        got = device.collect()
        assert torch.equal(got, torch.cat(want) if want else torch.empty(0, 32))
        if rng.random() < 0.5:
            backend.by_chance()
    device.close()
    assert backend.pinned_bytes == 0


@pytest.mark.parametrize("seed", range(8))
def test_rows_come_in_the_order_of_the_work_whatever_arrived_first(seed: int) -> None:
    rng = random.Random(seed)
    device, backend = opened(seed)
    for slot in range(3):
        device.load(0, slot, slot)
    backend.synchronize()
    device.load(0, 4, 1)
    device.load(0, 5, -1)
    work = [
        Work(2, 2, tokens(rng)),
        Work(4, 1, tokens(rng)),
        Work(5, -1, np.arange(FEW + 2)),
        Work(0, 0, np.arange(FEW + 1)),
        Work(0, 0, tokens(rng)),
    ]
    device.compute(0, X, work)
    assert torch.equal(device.collect(), expected(0, X, work))
    counts = [counts for _, counts in backend.kinds]
    assert sum(map(sum, counts)) == sum(len(one.tokens) for one in work)
    for kind, loads in backend.kinds:
        assert all((load <= FEW) == (kind == "few") for load in loads)


def test_experts_that_are_there_are_computed_together() -> None:
    device, backend = opened()
    for slot in range(3):
        device.load(0, slot, slot)
    backend.synchronize()
    device.compute(0, X, [Work(slot, slot, np.array([slot])) for slot in range(3)])
    device.collect()
    assert backend.kinds == [("few", [1, 1, 1])]


def test_a_load_that_has_not_begun_is_taken_back_and_one_that_has_is_not() -> None:
    device, backend = opened(in_flight=1)
    backend.random.choice = lambda _: 0  # type: ignore[method-assign]
    device.load(0, 0, 0)
    device.load(0, 1, 1)
    assert not device.cancel(0, 0)
    assert device.cancel(0, 1)
    assert not device.cancel(0, 1)
    with pytest.raises(ValueError, match="slot: got 1 of layer 0, expected one with weights"):
        device.compute(0, X, [Work(1, 1, np.array([0]))])
    device.load(0, 2, 1)
    work = [Work(2, 1, np.array([3]))]
    device.compute(0, X, work)
    assert torch.equal(device.collect(), expected(0, X, work))


def test_after_an_abort_nothing_is_known_to_be_anywhere() -> None:
    device, _ = opened()
    device.load(0, 0, 0)
    device.load(0, 1, -1)
    device.compute(0, X, [Work(0, 0, np.array([1]))])
    device.abort()
    assert device.collect().shape == (0, 32)
    for slot in (0, -1):
        with pytest.raises(ValueError, match="expected one with weights"):
            device.compute(0, X, [Work(0, slot, np.array([1]))])
    device.load(0, 3, 0)
    work = [Work(3, 0, np.array([1]))]
    device.compute(0, X, work)
    assert torch.equal(device.collect(), expected(0, X, work))


def test_times_say_what_ran_between_which_events() -> None:
    device, _ = opened()
    device.load(1, 4, 0)
    device.load(1, 5, 1)
    device.compute(1, X, [Work(4, 0, np.array([0])), Work(5, 1, np.array([1]))])
    device.collect()
    found = device.times()
    bus = [one for one in found if one[0] == "pcie"]
    assert [(label, kind) for _, _, _, label, kind in bus] == [
        ("1.4", "transfer"),
        ("1.5", "transfer"),
    ]
    computed = " ".join(label for resource, _, _, label, _ in found if resource == "gpu")
    assert sorted(computed.split()) == ["1.4", "1.5"]
    assert all(begin < end for _, begin, end, _, _ in found)
    assert device.times() == []


def test_a_device_without_the_memory_says_how_much_was_asked_for() -> None:
    device = CudaDevice(backend=FakeBackend(0, memory=1 << 10), costs=costs())
    with pytest.raises(MemoryError, match="expected at most 1024 bytes"):
        device.open(LAYERS, SLOTS, STAGING, reproducible=False)
    with pytest.raises(ValueError, match="closed"):
        device.begin()


def test_a_system_that_pins_no_more_is_told_of_the_other_way() -> None:
    backend = FakeBackend(0, pinnable=LAYERS[0].shape.nbytes)
    with pytest.raises(MemoryError, match="pinning='bounce'"):
        CudaDevice(backend=backend, costs=costs()).open(LAYERS, SLOTS, 0, reproducible=False)
    assert not backend.queues
    CudaDevice(backend=backend, pinning="bounce").open(LAYERS, SLOTS, 0, reproducible=False)


def test_reproducible_experts_all_go_to_the_kernels_with_the_bits_of_the_cpu() -> None:
    device, backend = opened()
    with pytest.raises(ValueError, match="device: got one that a runtime has open"):
        device.open(LAYERS, SLOTS, STAGING, reproducible=True)
    device.close()
    device.open(LAYERS, SLOTS, STAGING, reproducible=True)
    device.load(0, 1, 0)
    device.compute(0, X, [Work(1, 0, np.arange(12))])
    device.collect()
    assert backend.kinds == [("few", [12])]
    narrow = layers(ExpertsShape(2, 32, 32, "bf16", 0))
    device.close()
    with pytest.raises(ValueError, match=r"layers\[0\]: got 'bf16'"):
        device.open(narrow, SLOTS, STAGING, reproducible=True)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda d: d.load(0, 6, 0), "expert: got 6, expected 0 to 5"),
        (lambda d: d.load(0, 0, 3), "slot: got 3 of layer 0, expected -2 to 2"),
        (lambda d: d.load(0, 0, -3), "slot: got -3"),
        (lambda d: d.compute(0, X[:, :8], []), "x.shape"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(
    act: Callable[[CudaDevice], None], says: str
) -> None:
    device, _ = opened()
    with pytest.raises(ValueError, match=says):
        act(device)


def test_arguments_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="pinning: got 'other'"):
        CudaDevice(backend=FakeBackend(0), pinning="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_flight"):
        CudaDevice(backend=FakeBackend(0), in_flight=0)
    with pytest.raises(ValueError, match="device: got cpu"):
        CudaDevice("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_machine_without_a_device_says_so() -> None:
    with pytest.raises(ValueError, match="device: got cuda, expected one that torch sees"):
        CudaDevice()


def test_the_first_tile_is_gate_and_up() -> None:
    for shape in (SHAPE, replace(SHAPE, format="bf16", group=0), replace(SHAPE, group=64)):
        across = replace(shape, hidden=shape.intermediate, intermediate=shape.hidden)
        # Turned around, down is what was one of gate and up.
        assert first_tile(shape) // 2 + first_tile(across) == across.expert_bytes


def test_costs_are_of_both_kinds_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(0)
    monkeypatch.setattr(cuda_device, "profile_machine", lambda *_, **__: costs())
    found = measured_costs(
        SHAPE, backend, few=lambda _, load: load <= FEW, loads=(1, FEW + 1), rounds=3
    )
    assert found.gpu_source == "measured"
    assert found.transfer > 0
    assert {(kind, loads[0]) for kind, loads in backend.kinds} == {("few", 1), ("grouped", FEW + 1)}


@pytest.mark.parametrize("seed", range(4))
def test_a_runtime_gives_the_bits_of_the_cpu_alone(seed: int) -> None:
    named = {str(i): of for i, of in enumerate(LAYERS)}
    rng = torch.Generator().manual_seed(seed)
    device = CudaDevice(backend=FakeBackend(seed), costs=costs())
    with Runtime(named, device, slots=2, cache="lru") as runtime:
        for step in range(6):
            name = str(step % 2)
            ids = torch.rand(5, 6, generator=rng).topk(2).indices
            weights = torch.rand(5, 2, generator=rng)
            want = named[name](X[:5], ids, weights)
            assert torch.equal(runtime.layer(name)(X[:5], ids, weights), want)
