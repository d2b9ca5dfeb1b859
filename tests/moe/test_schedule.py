"""What every schedule promises, and small layers whose best schedule can be told by hand."""

import itertools
import math
import threading

import numpy as np
import pytest

from quernstone.moe import Layer, Schedule, schedule_layer
from quernstone.moe import reference_schedule as reference
from quernstone.moe.schedule import POLICIES, Policy

from .layers import HEURISTICS, assert_feasible, bus_free, random_layers

GPU = 1


def small(**changes: object) -> Layer:
    """Experts 0 and 1 are cached, 2 to 4 are not."""
    arguments: dict[str, object] = {
        "loads": [1, 4, 2, 8, 1],
        "ready": [True, True, False, False, False],
        "cpu": [1.0, 4.0, 2.0, 8.0, 1.0],
        "gpu": 1.0,
        "transfer": 2.0,
    }
    return Layer(**(arguments | changes))  # type: ignore[arg-type]


def gpu_side(schedule: Schedule) -> list[int]:
    """The experts of the GPU in its order."""
    mine = [i for i in range(len(schedule.device)) if schedule.device[i] == GPU]
    return sorted(mine, key=lambda i: schedule.order[i])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_schedule_is_feasible_and_tells_its_ends(policy: Policy) -> None:
    for layer in random_layers(150, seed=0, most=10):
        assert_feasible(layer, schedule_layer(layer, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_expert_gives_an_empty_schedule(policy: Policy) -> None:
    layer = Layer([], [], [], [], [], cpu_free=3.0, gpu_free=2.0, pcie_free=1.0)
    schedule = schedule_layer(layer, policy)
    assert len(schedule.device) == 0
    assert schedule.makespan == 0.0
    assert (schedule.cpu_end, schedule.gpu_end, schedule.pcie_end) == (3.0, 2.0, 1.0)
    assert schedule.intervals() == []


def test_hybrid_is_never_behind_list_and_event_and_exact_never_behind_any() -> None:
    layers = random_layers(400, seed=1, most=12) + random_layers(40, seed=2, least=30, most=64)
    for layer in layers:
        ends = {policy: schedule_layer(layer, policy).makespan for policy in POLICIES}
        assert ends["hybrid"] <= min(ends["list"], ends["event"])
        assert ends["exact"] <= min(ends.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_layers_have_equal_schedules_on_every_thread(policy: Policy) -> None:
    layer = random_layers(1, seed=3, least=20, most=20)[0]
    other = random_layers(1, seed=4, least=40, most=40)[0]
    want = schedule_layer(layer, policy)
    found: list[Schedule] = []

    def work() -> None:
        schedule_layer(other, policy)  # what the scratch holds must not matter
        found.extend(schedule_layer(layer, policy) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    for schedule in found:
        assert schedule.makespan == want.makespan
        for name in ("device", "order", "start", "end", "transfer_start", "transfer_end"):
            np.testing.assert_array_equal(getattr(schedule, name), getattr(want, name))


def test_the_fixed_mapping_computes_where_the_weights_are() -> None:
    schedule = schedule_layer(small(cpu_first=0.5), "fixed")
    assert schedule.device.tolist() == [1, 1, 0, 0, 0]
    assert schedule.makespan == schedule.cpu_end == 0.5 + 2 + 8 + 1
    assert schedule.gpu_end == 2.0
    assert np.isnan(schedule.transfer_start).all()


def test_everything_on_the_gpu_waits_for_the_bus_alone() -> None:
    schedule = schedule_layer(small(), "gpu_only")
    # Cached by load, then moved by load: 1, 0, then 3, 2, 4 arriving at 2, 4, 6.
    assert gpu_side(schedule) == [1, 0, 3, 2, 4]
    assert schedule.start[gpu_side(schedule)].tolist() == [0, 1, 2, 4, 6]
    assert schedule.pcie_end == 6.0
    assert schedule.makespan == 7.0


def test_everything_on_the_cpu_pays_for_the_first_once() -> None:
    schedule = schedule_layer(small(cpu_first=0.5, cpu_free=0.25), "cpu_only")
    assert schedule.makespan == 0.25 + 0.5 + 16
    assert schedule.start.min() == 0.25


def test_fiddler_weighs_each_expert_alone() -> None:
    # Transfer and GPU take 3: only expert 3, with 8 on the CPU, is moved; a tie stays on the CPU.
    assert gpu_side(schedule_layer(small(), "fiddler")) == [1, 0, 3]
    assert gpu_side(schedule_layer(small(cpu=[9, 9, 3, 8, 1]), "fiddler")) == [1, 0, 3]


def test_one_list_is_taken_from_both_ends() -> None:
    # List 1 0 3 2 4. GPU 1 (1), CPU 4 (1 <= 2: a tie with the GPU's 2 is broken for the smaller
    # total), GPU 0 (2), GPU 3 (3 = CPU's 1 + 2), CPU 2 (3).
    schedule = schedule_layer(small(), "list")
    assert gpu_side(schedule) == [1, 0, 3]
    assert schedule.makespan == 3.0


def test_an_idle_cpu_takes_the_smallest_cached_expert() -> None:
    layer = Layer([3, 2, 1], [True] * 3, [3.0, 2.0, 1.0], 2.0, 9.0)
    for policy in ("event", "hybrid", "exact", "list"):
        schedule = schedule_layer(layer, policy)
        assert schedule.makespan == 3.0 if policy in ("hybrid", "exact") else 4.0
        assert schedule.device[0] == GPU or policy in ("hybrid", "exact")


def test_the_event_simulation_moves_while_the_gpu_is_busy() -> None:
    # Bus: 3 arrives at 2. CPU: 4 until 1, 2 until 3. GPU: 1, 0, then 3 from 2 to 3.
    schedule = schedule_layer(small(), "event")
    assert gpu_side(schedule) == [1, 0, 3]
    assert (schedule.transfer_start[3], schedule.transfer_end[3]) == (0.0, 2.0)
    assert schedule.start[3] == 2.0
    assert schedule.makespan == 3.0


def test_an_expert_in_flight_needs_no_second_transfer_and_is_not_begun_before_it_arrives() -> None:
    layer = Layer([1, 1], [2.5, math.inf], [9.0, 9.0], 1.0, 1.0)
    schedule = schedule_layer(layer, "gpu_only")
    assert math.isnan(schedule.transfer_start[0])
    assert schedule.start[0] == 2.5
    # The bus is busy until what is in flight has arrived.
    assert (schedule.transfer_start[1], schedule.start[1]) == (2.5, 3.5)


def test_a_device_without_experts_does_not_delay_the_layer() -> None:
    layer = Layer([1], [True], [1.0], 1.0, 1.0, cpu_free=50.0, gpu_free=2.0)
    for policy in ("fixed", "hybrid", "exact"):
        assert schedule_layer(layer, policy).makespan == 3.0
    layer = Layer([1], [True], [1.0], 1.0, 1.0, cpu_free=2.0, gpu_free=50.0)
    for policy in ("hybrid", "exact"):
        assert schedule_layer(layer, policy).makespan == 3.0


def test_of_equal_makespans_hybrid_moves_least() -> None:
    # The CPU has both done at 2; a transfer would do no better.
    layer = Layer([1, 1], [False, False], [1.0, 1.0], 1.0, 1.0)
    schedule = schedule_layer(layer, "hybrid")
    assert schedule.makespan == 2.0
    assert np.isnan(schedule.transfer_start).all()


def test_no_order_of_transfers_or_of_the_gpu_beats_the_layout() -> None:
    """Every permutation of the bus and of the GPU, which may wait for a late arrival."""
    for layer in random_layers(25, seed=5, least=4, most=4):
        want = reference.lay_out(layer, [True] * 4).makespan
        moved = [i for i in range(4) if math.isinf(layer.ready[i])]
        best = math.inf
        for sent in itertools.permutations(moved):
            arrival, bus = layer.ready.copy(), bus_free(layer)
            for i in sent:
                bus = arrival[i] = bus + layer.transfer[i]
            for order in itertools.permutations(range(4)):
                gpu = layer.gpu_free
                for i in order:
                    gpu = max(gpu, arrival[i]) + layer.gpu[i]
                best = min(best, gpu)
        assert want == best


def test_hybrid_is_optimal_where_gpu_and_bus_cannot_tell_experts_apart() -> None:
    rng = np.random.default_rng(6)
    for k in range(1200):
        # Most are small, and a third have nothing cached: there every term of the sum counts. Where
        # the CPU's time has nothing to do with the load, list and event are no help.
        n = int(rng.integers(1, 60 if k % 6 == 0 else 9))
        loads = rng.integers(1, 50, n)
        cpu, gpu, transfer, first = (float(x) / 64 for x in rng.integers(1, 64, 4))
        cached = rng.random(n) < 0.4 * (k % 3)
        cost = cpu * loads / 8 if k % 2 else rng.integers(1, 256, n) / 64
        layer = Layer(loads, cached, cost, gpu, transfer, cpu_first=first)
        want = schedule_layer(layer, "exact").makespan
        assert schedule_layer(layer, "hybrid").makespan == want
        assert reference.uniform(layer)


def test_intervals_are_named_and_sorted_by_resource_and_time() -> None:
    schedule = schedule_layer(small(), "fixed")
    found = schedule.intervals()
    assert found == sorted(found)
    assert ("gpu", 0.0, 1.0, "expert 1", "compute") in found
    assert len(found) == 5
    named = schedule_layer(small(), "gpu_only").intervals([f"e{i}" for i in range(5)])
    assert ("pcie", 0.0, 2.0, "e3", "transfer") in named
    assert len(named) == 8
    with pytest.raises(ValueError, match="labels: got 1, expected 5"):
        schedule.intervals(["one"])


def test_cached_flags_are_worth_arrivals() -> None:
    flags = schedule_layer(small(), "hybrid")
    times = schedule_layer(small(ready=[0.0, 0.0, math.inf, math.inf, math.inf]), "hybrid")
    np.testing.assert_array_equal(flags.start, times.start)


def test_a_layer_keeps_what_it_was_made_of() -> None:
    own = {"cpu": np.array([1.0, 4.0, 2.0, 8.0, 1.0]), "loads": np.array([1, 4, 2, 8, 1])}
    layer = small(**own)
    before = schedule_layer(layer, "event")
    for name, column in own.items():
        column[:] = 100
        with pytest.raises(ValueError, match="read-only"):
            getattr(layer, name)[0] = 1
    after = schedule_layer(layer, "event")
    assert after.makespan == before.makespan
    np.testing.assert_array_equal(after.order, before.order)


def test_scaling_every_time_scales_the_schedule() -> None:
    """By a power of two: no policy may depend on the unit of time."""
    for layer in random_layers(60, seed=7, most=14):
        loads, *times = layer.columns
        first, cpu, gpu, pcie = (8 * x for x in layer.starts)
        scaled = Layer(
            loads, *(8 * x for x in times), cpu_first=first, cpu_free=cpu, gpu_free=gpu,
            pcie_free=pcie,
        )  # fmt: skip
        for policy in HEURISTICS:
            one, two = schedule_layer(layer, policy), schedule_layer(scaled, policy)
            assert two.makespan == 8 * one.makespan
            np.testing.assert_array_equal(one.device, two.device)


@pytest.mark.parametrize("n", [1, 2, 255, 1023, 1024])
def test_layers_up_to_the_largest_are_scheduled(n: int) -> None:
    rng = np.random.default_rng(n)
    loads = rng.integers(1, 100, n)
    ready = rng.random(n) < 0.5
    layer = Layer(loads, ready, rng.random(n), rng.random(n), rng.random(n))
    ends = {policy: schedule_layer(layer, policy).makespan for policy in HEURISTICS}
    assert ends["hybrid"] <= min(ends.values())
    schedule = schedule_layer(layer, "hybrid")
    assert schedule.makespan == schedule.end.max()
