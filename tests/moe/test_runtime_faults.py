"""What goes wrong while a layer runs is told, threads are joined, nothing half done is given."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quernstone.moe import (
    EmulatedDevice,
    Experts,
    HybridMoE,
    Runtime,
    Work,
    load_experts,
    save_experts,
)
from tests.moe.test_runtime import (
    AT_ONCE,
    COSTS,
    COUNT,
    HIDDEN,
    NAMES,
    TOP,
    make_call,
    make_layers,
)


@pytest.fixture(scope="module")
def layers() -> dict[str, Experts]:
    return make_layers()


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


class Failing(EmulatedDevice):
    """Fails at the n-th call of one kind."""

    def __init__(self, at: str, error: BaseException) -> None:
        super().__init__(COSTS, factor=AT_ONCE)
        self.at, self.error = at, error
        self.armed = False

    def _maybe(self, at: str) -> None:
        if self.armed and at == self.at:
            self.armed = False
            raise self.error

    def load(self, layer: int, expert: int, slot: int) -> None:
        self._maybe("load")
        super().load(layer, expert, slot)

    def compute(self, layer: int, x: Tensor, work: Sequence[Work]) -> None:
        super().compute(layer, x, work)
        self._maybe("compute")

    def collect(self) -> Tensor:
        self._maybe("collect")
        return super().collect()


@pytest.mark.parametrize("at", ["load", "compute", "collect"])
@pytest.mark.parametrize("error", [RuntimeError("device lost"), MemoryError("full")])
def test_a_device_that_fails_is_told_of_and_the_next_step_is_right(
    layers: dict[str, Experts], at: str, error: BaseException
) -> None:
    before = threads()
    device = Failing(at, error)
    call = make_call(torch.Generator().manual_seed(1), 4)
    with Runtime(layers, device, slots=2, cache="lru", policy="gpu_only") as runtime:
        module = runtime.layer("first")
        device.armed = True
        with pytest.raises(type(error), match=str(error)):
            module(*call)
        assert runtime.resident("first") == []
        assert torch.equal(module(*call), layers["first"](*call[:3]))
    assert threads() == before


def test_an_interrupt_ends_a_layer_early_and_leaves_no_thread(layers: dict[str, Experts]) -> None:
    before = threads()
    slow = EmulatedDevice(COSTS, factor=1e6)  # a layer of minutes
    call = make_call(torch.Generator().manual_seed(1), 1)
    for policy in ("cpu_only", "gpu_only"):
        with Runtime(layers, slow, slots=COUNT, cache="lru", policy=policy) as runtime:  # type: ignore[arg-type]
            got = None
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                got = runtime.layer("first")(*call)
            assert time.monotonic() - begin < 30.0
            assert got is None
        assert threads() == before
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_device_without_enough_memory_is_told_of(layers: dict[str, Experts]) -> None:
    before = threads()
    size = layers["first"].shape.expert_bytes
    device = EmulatedDevice(COSTS, factor=1.0, memory=10 * size)
    with pytest.raises(MemoryError, match=r"slots: got \(3, 3, 3\) and 4 for all layers"):
        Runtime(layers, device, slots=3)
    with Runtime(layers, device, slots=2):
        pass
    assert threads() == before


def test_a_closed_runtime_refuses(layers: dict[str, Experts]) -> None:
    runtime = Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), cache="lru")
    call = make_call(torch.Generator().manual_seed(1), 1)
    runtime.layer("first")(*call)
    runtime.close()
    runtime.close()
    with pytest.raises(ValueError, match="runtime: got one that is closed"):
        runtime.layer("first")(*call)


def test_a_runtime_without_a_device_is_closed_too(layers: dict[str, Experts]) -> None:
    with Runtime(layers) as runtime:
        pass
    with pytest.raises(ValueError, match="runtime: got one that is closed"):
        runtime.layer("first")(*make_call(torch.Generator().manual_seed(1), 1))


def test_a_device_belongs_to_one_runtime(layers: dict[str, Experts]) -> None:
    call = make_call(torch.Generator().manual_seed(1), 3)
    device = EmulatedDevice(COSTS, factor=AT_ONCE)
    with Runtime(layers, device, cache="lru", slots=2) as runtime:
        with pytest.raises(ValueError, match="device: got one that a runtime has open"):
            Runtime(dict(reversed(layers.items())), device)
        assert torch.equal(runtime.layer("first")(*call), layers["first"](*call[:3]))
    with Runtime(layers, device, cache="lru") as runtime:
        assert torch.equal(runtime.layer("third")(*call), layers["third"](*call[:3]))


class InterruptedTwice(Failing):
    """Ctrl-C once more while the step is given up, when slots hold anything."""

    def abort(self) -> None:
        super().abort()
        if self.error is not None and not self.told:
            self.told = True
            for slot in range(COUNT):
                EmulatedDevice.load(self, 0, 0, slot)
            raise KeyboardInterrupt

    told = False


@pytest.mark.parametrize("at", ["compute", "collect"])
def test_a_second_interrupt_leaves_nothing_that_is_taken_for_loaded(
    layers: dict[str, Experts], at: str
) -> None:
    device = InterruptedTwice(at, KeyboardInterrupt())
    call = make_call(torch.Generator().manual_seed(1), 3)
    with Runtime(layers, device, policy="fixed", cache="lru", slots=COUNT) as runtime:
        module = runtime.layer("first")
        device.armed = True
        with pytest.raises(KeyboardInterrupt):
            module(*call)
        assert device.told
        assert torch.equal(module(*call), layers["first"](*call[:3]))


def test_placing_after_a_recovery_that_was_cut_short_makes_it_whole(
    layers: dict[str, Experts],
) -> None:
    device = InterruptedTwice("compute", KeyboardInterrupt())
    call = make_call(torch.Generator().manual_seed(1), 3)
    with Runtime(layers, device, policy="fixed", cache="lru", slots=COUNT) as runtime:
        device.armed = True
        with pytest.raises(KeyboardInterrupt):
            runtime.layer("first")(*call)
        assert device.told
        runtime.place("second", [0])
        assert torch.equal(runtime.layer("first")(*call), layers["first"](*call[:3]))


def test_experts_whose_placing_failed_are_not_taken_for_loaded(layers: dict[str, Experts]) -> None:
    device = Failing("load", RuntimeError("device lost"))
    x, _, weights, scores = make_call(torch.Generator().manual_seed(1), 1)
    ids = torch.arange(TOP)[None]
    with Runtime(layers, device, policy="fixed", cache="lru", slots=TOP) as runtime:
        runtime.place("first", range(COUNT - TOP, COUNT))
        device.armed = True
        with pytest.raises(RuntimeError, match="device lost"):
            runtime.place("first", range(TOP))
        got = runtime.layer("first")(x, ids, weights, scores)
        assert torch.equal(got, layers["first"](x, ids, weights))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_and_ends(layers: dict[str, Experts]) -> None:
    call = make_call(torch.Generator().manual_seed(1), 1)
    runtime = Runtime(
        layers, EmulatedDevice(COSTS, factor=AT_ONCE), policy="fixed", cache="lru", slots=COUNT
    )
    want = runtime.layer("first")(*call)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            try:
                runtime.layer("first")(*call)
            except ValueError as error:
                code = 0 if "a process that was forked" in str(error) else 2
            runtime.close()
            del runtime
        except BaseException:
            code = 3
        finally:
            os._exit(code)  # or the child would run the tests that are left
    until = time.monotonic() + 20.0
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(runtime.layer("first")(*call), want)
    runtime.close()


def test_a_file_that_is_cut_short_while_it_is_mapped_is_told_of(
    layers: dict[str, Experts], tmp_path: Path
) -> None:
    path = tmp_path / "layers.experts"
    save_experts(path, layers)
    whole = path.read_bytes()
    call = make_call(torch.Generator().manual_seed(1), 2)
    for device in (None, EmulatedDevice(COSTS, factor=AT_ONCE)):
        mapped = load_experts(path, memory="map")
        with Runtime(mapped, device, cache="lru") as runtime:
            module = runtime.layer("third")
            assert torch.equal(module(*call), layers["third"](*call[:3]))
            os.truncate(path, len(whole) // 2)
            with pytest.raises(ValueError, match="the file of the experts"):
                module(*call)
            with path.open("r+b") as file:
                file.write(whole)
            with pytest.raises(OSError, match="written to after it was mapped"):
                module(*call)


def test_a_file_that_is_replaced_while_it_is_mapped_changes_nothing(
    layers: dict[str, Experts], tmp_path: Path
) -> None:
    path = tmp_path / "layers.experts"
    save_experts(path, layers)
    call = make_call(torch.Generator().manual_seed(1), 2)
    module = HybridMoE(load_experts(path, memory="map")["third"])
    save_experts(path, make_layers(seed=77))
    assert torch.equal(module(*call), layers["third"](*call[:3]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, i, w, s: (x[0], i, w, s), ValueError, "x.ndim: got 1, expected 2"),
        (lambda x, i, w, s: (x[:, :8], i, w, s), ValueError, "x.shape\\[1\\]: got 8"),
        (lambda x, i, w, s: (x.double(), i, w, s), TypeError, "x.dtype: got torch.float64"),
        (lambda x, i, w, s: (x, i.int(), w, s), TypeError, "ids.dtype: got torch.int32"),
        (lambda x, i, w, s: (x, i[:1], w, s), ValueError, "ids.shape\\[0\\]: got 1, expected 2"),
        (lambda x, i, w, s: (x, i + COUNT, w, s), ValueError, "ids: got"),
        (lambda x, i, w, s: (x, i * 0, w, s), ValueError, "ids: an expert twice"),
        (lambda x, i, w, s: (x, i, w[:, :2], s), ValueError, "weights.shape\\[1\\]: got 2"),
        (lambda x, i, w, s: (x, i, w * float("nan"), s), ValueError, "weights: got a number"),
        (lambda x, i, w, s: (None, i, w, s), TypeError, "x: got NoneType, expected a Tensor"),
    ],
)
def test_a_bad_call_is_refused_by_name_and_changes_nothing(
    layers: dict[str, Experts], change: object, error: type[Exception], message: str
) -> None:
    x, _, _, scores = make_call(torch.Generator().manual_seed(1), 2)
    weights, ids = scores.topk(TOP)
    bad = change(x, ids, weights, scores)  # type: ignore[operator]
    with Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), slots=3) as runtime:
        with pytest.raises(error, match=message):
            runtime.layer("first")(*bad)
        got = runtime.layer("first")(x, ids, weights, scores)
    with pytest.raises(error, match=message):
        HybridMoE(layers["first"])(*bad)
    assert torch.equal(got, layers["first"](x, ids, weights))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores: got None, expected the router's softmax"),
        (torch.ones(2, COUNT - 1), "scores.shape\\[1\\]: got 7, expected 8"),
        (torch.full((2, COUNT), -1.0), "scores: got a number that is no score"),
    ],
)
def test_caches_that_go_by_scores_need_good_ones(
    layers: dict[str, Experts], scores: Tensor | None, message: str
) -> None:
    x, ids, weights, _ = make_call(torch.Generator().manual_seed(1), 2)
    with (
        Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), cache="reuse") as runtime,
        pytest.raises(ValueError, match=message),
    ):
        runtime.layer("first")(x, ids, weights, scores)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"policy": "fast"}, ValueError, "policy: got 'fast'"),
        ({"cache": "belady"}, ValueError, "cache: got 'belady'"),
        ({"prefetch": 4}, ValueError, "prefetch: got 4, expected 0 to 3"),
        ({"prefetch": 1.5}, TypeError, "prefetch: got float"),
        ({"slots": [1, 2]}, ValueError, "slots: got 2 numbers, expected 3"),
        ({"slots": -1}, ValueError, "slots\\[0\\]: got -1, expected at least 0"),
        ({"costs": COSTS}, ValueError, "costs: got some beside an emulated device"),
    ],
)
def test_a_bad_setting_is_refused_by_name(
    layers: dict[str, Experts], how: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), **how)  # type: ignore[arg-type]


def test_layers_that_are_none_are_refused(layers: dict[str, Experts]) -> None:
    with pytest.raises(ValueError, match="layers: got none"):
        Runtime({})
    with pytest.raises(TypeError, match=r"layers\['a'\]: got int, expected Experts"):
        Runtime({"a": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="got 'float', expected 'int8' with reproducible"):
        Runtime(make_layers("bf16"), reproducible=True)
    with Runtime(layers) as runtime, pytest.raises(ValueError, match="name: got 'fourth'"):
        runtime.layer("fourth")
    with pytest.raises(ValueError, match="costs: got 'tpu', expected one of"):
        EmulatedDevice("tpu")
    with (
        Runtime(layers, EmulatedDevice(COSTS, factor=AT_ONCE), slots=2) as runtime,
        pytest.raises(ValueError, match="experts: got 3, expected at most 2"),
    ):
        runtime.place(NAMES[0], (1, 2, 3))


def test_a_module_survives_a_pickle(layers: dict[str, Experts]) -> None:
    module = HybridMoE(layers["first"])
    again = pickle.loads(pickle.dumps(module))
    call = make_call(torch.Generator().manual_seed(1), 2)
    assert torch.equal(again(*call), module(*call))
    assert again.experts.shape.hidden == HIDDEN
