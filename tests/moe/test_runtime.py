"""Layers that run on the CPU and on an emulated device: the bits of their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quernstone.moe import (
    MODELS,
    PRESETS,
    CostModel,
    EmulatedDevice,
    Experts,
    ExpertsShape,
    HybridMoE,
    Runtime,
    reference,
)
from quernstone.moe.cache.policies import POLICIES as CACHES
from quernstone.moe.schedule import POLICIES
from quernstone.moe.torch_op import operands

COUNT, HIDDEN, WIDE, TOP = 8, 40, 48, 3
NAMES = ("first", "second", "third")
OF = MODELS["deepseek-v2-lite"]
COSTS = CostModel.of_machine(
    PRESETS["a6000-xeon10"], ExpertsShape(OF.experts, OF.hidden, OF.intermediate)
)
# No time is waited for: the workers race as fast as they can.
AT_ONCE = 1e-4

Call = tuple[Tensor, Tensor, Tensor, Tensor]


def make_layers(format: str = "int4", seed: int = 0) -> dict[str, Experts]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    return {
        name: Experts.pack(
            random(COUNT, 2 * WIDE, HIDDEN),
            random(COUNT, HIDDEN, WIDE),
            format=format,  # type: ignore[arg-type]
        )
        for name in NAMES
    }


def make_call(generator: torch.Generator, tokens: int) -> Call:
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.randn(tokens, COUNT, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP)
    if tokens > 1:
        ids[0, 1] = -1
    return x, ids, weights, scores


@pytest.fixture(scope="module")
def layers() -> dict[str, Experts]:
    return make_layers()


def routers(runtime: Runtime, seed: int) -> None:
    weight = torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(seed))
    for name in runtime.layers:
        runtime.set_router(name, lambda x: x @ weight.T)


def settings(count: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "policy": rng.choice([policy for policy in POLICIES if policy != "exact"]),
            "cache": rng.choice([cache for cache in CACHES if cache != "belady"]),
            "slots": [int(n) for n in rng.integers(0, COUNT + 1, len(NAMES))],
            "prefetch": int(rng.integers(0, 4)),
        }


def test_ten_thousand_schedules_cache_states_and_prefetches_give_the_same_bits(
    layers: dict[str, Experts],
) -> None:
    generator = torch.Generator().manual_seed(3)
    calls = {n: [make_call(generator, n) for _ in range(4)] for n in (1, 2, 5)}
    want = {
        (name, n, i): layers[name](*call[:3])
        for name in NAMES
        for n, some in calls.items()
        for i, call in enumerate(some)
    }
    rng = np.random.default_rng(1)
    executed = 0
    for seed, how in enumerate(settings(50)):
        device = EmulatedDevice(COSTS, factor=AT_ONCE)
        with Runtime(layers, device, **how) as runtime:  # type: ignore[arg-type]
            routers(runtime, seed)
            for _ in range(67):
                for layer, name in enumerate(NAMES):
                    if rng.random() < 0.1:
                        slots = runtime.slots[layer]
                        runtime.place(name, rng.permutation(COUNT)[:slots].tolist())
                    n, i = int(rng.choice(list(calls))), int(rng.integers(4))
                    got = runtime.layer(name)(*calls[n][i])
                    assert torch.equal(got, want[name, n, i]), (how, name, n)
                    executed += 1
    assert executed >= 10_000


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_mixed_experts_have_the_same_bits_under_every_schedule(format: str, isa: str) -> None:
    of = make_layers(format)
    for experts in of.values():
        experts.compute = "mixed"
    # Some experts of a call have fewer than 64 tokens, some more.
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(5), 160)
    loads = torch.bincount(ids[ids >= 0].flatten(), minlength=COUNT)
    assert bool((loads >= 64).any())
    assert bool((loads < 64).any())
    want = {name: experts(x, ids, weights) for name, experts in of.items()}
    for seed, how in enumerate(settings(20)):
        device = EmulatedDevice(COSTS, factor=AT_ONCE)
        with Runtime(of, device, **how) as runtime:  # type: ignore[arg-type]
            routers(runtime, seed)
            for name in (*NAMES, *NAMES):
                got = runtime.layer(name)(x, ids, weights, scores)
                assert torch.equal(got, want[name]), (how, name)
    with Runtime(of) as runtime:
        assert torch.equal(runtime.layer(NAMES[0])(x, ids, weights), want[NAMES[0]])
    with pytest.raises(ValueError, match="compute: got 'mixed', expected 'int8' with reproducible"):
        Runtime(of, reproducible=True)
    of[NAMES[1]].compute = "float"
    with pytest.raises(ValueError, match="got some that compute as float and mixed, expected one"):
        Runtime(of, EmulatedDevice(COSTS, factor=AT_ONCE))


@pytest.mark.parametrize("format", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_and_dtype_gives_the_bits_of_the_experts(
    format: str, dtype: torch.dtype
) -> None:
    of = make_layers(format)
    generator = torch.Generator().manual_seed(5)
    with Runtime(of, EmulatedDevice(COSTS, factor=AT_ONCE), slots=3, cache="lru") as runtime:
        for name, tokens in itertools.product(NAMES, (1, 4)):
            x, ids, weights, _ = make_call(generator, tokens)
            got = runtime.layer(name)(x.to(dtype), ids, weights)
            assert got.dtype == dtype
            assert torch.equal(got, of[name](x.to(dtype), ids, weights))
            assert torch.equal(got, HybridMoE(of[name])(x.to(dtype), ids, weights))


def test_the_sum_is_that_of_the_reference(layers: dict[str, Experts]) -> None:
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(7), 5)
    matrices = [layers["first"].matrices(e) for e in range(COUNT)]
    want = reference.experts(matrices, x, ids, weights)
    with Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE)) as runtime:
        got = runtime.layer("first")(x, ids, weights, scores)
    # Activations of 8 bits, twice: as the experts' own tests have it.
    assert float((got - want).norm() / want.norm()) < 0.02


def test_the_device_computes_with_its_own_copies() -> None:
    of = make_layers(seed=9)
    call = make_call(torch.Generator().manual_seed(2), 3)
    device = EmulatedDevice(COSTS, factor=AT_ONCE)
    with Runtime(of, device, slots=COUNT, policy="gpu_only", cache="lru") as runtime:
        module = runtime.layer("first")
        before = module(*call)
        of["first"].data[:] = 0
        assert torch.equal(module(*call), before)
        runtime.place("first", range(COUNT))  # brings the zeros
        assert not module(*call).any()


def test_a_token_without_experts_and_a_call_without_tokens_give_zeros(
    layers: dict[str, Experts],
) -> None:
    with Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), cache="lru") as runtime:
        module = runtime.layer("second")
        none = torch.full((2, TOP), -1)
        assert not module(torch.ones(2, HIDDEN), none, torch.ones(2, TOP)).any()
        empty = module(torch.ones(0, HIDDEN), none[:0], torch.ones(0, TOP))
        assert empty.shape == (0, HIDDEN)


def test_a_runtime_without_a_device_is_the_experts_themselves(layers: dict[str, Experts]) -> None:
    call = make_call(torch.Generator().manual_seed(4), 2)
    with Runtime(layers) as runtime:
        assert runtime.layers == NAMES
        assert runtime.slots == (0, 0, 0)
        got = runtime.layer("third")(*call)
    assert torch.equal(got, layers["third"](*call[:3]))
    assert not list(runtime.layer("third").parameters())


def test_static_mappings_keep_what_was_placed(layers: dict[str, Experts]) -> None:
    generator = torch.Generator().manual_seed(8)
    with Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), slots=3, policy="fixed") as runtime:
        runtime.place("first", (5, 1, 7))
        for _ in range(5):
            runtime.layer("first")(*make_call(generator, 1))
        assert runtime.resident("first") == [1, 5, 7]


def test_what_a_step_misses_is_on_the_device_later() -> None:
    of = make_layers(seed=11)
    slow_cpu = replace(COSTS, scale=50.0)
    device = EmulatedDevice(slow_cpu, factor=AT_ONCE)
    with Runtime(of, device, slots=TOP, cache="lru") as runtime:
        call = make_call(torch.Generator().manual_seed(1), 1)
        runtime.layer("first")(*call)
        assert runtime.resident("first") == sorted(call[1][0].tolist())


def test_prefetching_brings_what_the_next_router_will_choose(layers: dict[str, Experts]) -> None:
    call = make_call(torch.Generator().manual_seed(6), 1)
    # All that this layer needs is there, so the bus has nothing else to do; the next layer, which
    # has nothing, would wait for the first of its experts, and for no other.
    costs = replace(COSTS, scale=50.0, transfer=COSTS.transfer / 100)
    likely = torch.zeros(1, COUNT)
    likely[0, [1, 4, 6]] = 1.0
    device = EmulatedDevice(costs, factor=AT_ONCE)
    with Runtime(layers, device, slots=TOP, cache="lru", prefetch=1) as runtime:
        runtime.set_router("second", lambda x: likely)
        runtime.place("first", call[1][0].tolist())
        runtime.place("second", [0, 2, 3])
        runtime.layer("first")(*call)
        assert len({1, 4, 6} & set(runtime.resident("second"))) == 1


def test_a_recording_has_what_was_planned_and_what_was_done(layers: dict[str, Experts]) -> None:
    generator = torch.Generator().manual_seed(12)
    device = EmulatedDevice(COSTS, factor=2.0)
    with Runtime(layers, device, slots=3, cache="lru") as runtime:
        with runtime.recording() as recording:
            for name in NAMES:
                runtime.layer(name)(*make_call(generator, 1))
        real, planned = recording.plan(), recording.predicted()
    assert "emulated" in real.title
    assert "emulated" in planned.title
    assert [step.layer for step in recording.steps] == [0, 1, 2]
    done = {(one.resource, one.label) for one in real.intervals if one.kind == "compute"}
    assert {(one.resource, one.label) for one in planned.intervals if one.kind == "compute"} == done
    for resource in ("gpu", "pcie", "cpu"):
        spans = sorted((one.start, one.end) for one in real.intervals if one.resource == resource)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for step in recording.steps:
        assert step.took >= step.predicted  # nothing is done before its time


def test_emulated_times_are_longer_than_the_work(layers: dict[str, Experts]) -> None:
    device = EmulatedDevice("h100")
    with Runtime(layers, device, cache="lru"):
        assert device.factor is not None
        costs = device.costs(layers["first"].shape)
        assert device.factor * min(costs.gpu([1])[0], costs.cpu([1])[0]) >= 1e-3
        assert device.name == f"h100, emulated, times x{device.factor:g}"


def test_the_arithmetic_of_bytes_is_the_same_at_every_level(
    layers: dict[str, Experts], isa: str
) -> None:
    # Made once, on the portable level, which every processor has.
    call = make_call(torch.Generator().manual_seed(10), 5)[:3]
    assert torch.equal(layers["first"](*call), portable(lambda: layers["first"](*call)))
    of = make_layers("int8")["first"]
    assert torch.equal(of(*call), portable(lambda: of(*call)))


def portable(run: Callable[[], Tensor]) -> Tensor:
    from quernstone import isa, isas, set_isa

    before = isa()
    set_isa(isas()[0])
    try:
        return run()
    finally:
        set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_traced_the_operator_gives_what_it_gives_called(dtype: torch.dtype) -> None:
    experts = make_layers()["first"]
    x, ids, weights, _ = make_call(torch.Generator().manual_seed(5), 3)
    module, x = HybridMoE(experts), x.to(dtype)
    packed, settings = operands(experts)
    torch.library.opcheck(
        torch.ops.quernstone.moe_experts.default, (x, ids, weights, packed, settings)
    )
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, ids, weights), module(x, ids, weights))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (torch.zeros(5, dtype=torch.int64), "settings.shape"),
        (torch.zeros(6), "settings.dtype"),
        (torch.zeros(12, dtype=torch.int64)[::2], "settings: got a strided tensor"),
        (torch.tensor([3, HIDDEN, WIDE, 32, 0, 1]), "format"),
        (torch.tensor([2, HIDDEN, WIDE - 16, 32, 0, 1]), "packed.shape"),
    ],
)
def test_the_operator_refuses_settings_that_its_experts_cannot_have(
    settings: Tensor, error: str
) -> None:
    packed, _ = operands(make_layers()["first"])
    x, ids, weights, _ = make_call(torch.Generator().manual_seed(5), 1)
    with pytest.raises(ValueError, match=error):
        torch.ops.quernstone.moe_experts.default(x, ids, weights, packed, settings)
