"""The CUDA kernels of experts under the emulator, called as Python calls them, beside the CPU's.

Emulated results say that the code is right, nothing about its speed. Every call runs twice, with
threads and blocks in opposite orders and other poison in fresh memory: a missing barrier or a read
of what nobody wrote would give other bits.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone import _core
from quernstone.moe import ExpertsShape
from quernstone.moe.cuda_experts import Library, few_tokens
from tests.cpp.conftest import build
from tests.moe.device_cases import FEW_TOKENS, Call, DeviceCase

Run = Callable[[Call], Tensor]

ASCENDING, DESCENDING, SHUFFLED = range(3)


@pytest.fixture(scope="module")
def emulated() -> tuple[Library, Any]:
    """The emulated build, and what sets the order of its threads."""
    path = build("unit", "quernstone_cuda_emulated") / "libquernstone_cuda_emulated.so"
    set_schedule = ctypes.CDLL(str(path)).emulation_set_schedule
    set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    return Library(path), set_schedule


@pytest.fixture
def run(emulated: tuple[Library, Any]) -> Run:
    """A call, held to give the same bits in any order."""
    library, set_schedule = emulated

    def both(call: Call) -> Tensor:
        found = []
        for order, poison in ((ASCENDING, 0xFF), (DESCENDING, 0x11)):
            set_schedule(order, 0, poison)
            found.append(result(library, call))
        assert same_bits(*found)
        return found[0]

    return both


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Outputs and scratch memory start as NaN under torch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def result(library: Library, call: Call) -> Tensor:
    made = library.call(*call.arguments)
    made.gate_up()
    return made.down()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=77.0), b.nan_to_num(nan=77.0))


@pytest.mark.parametrize("case", FEW_TOKENS, ids=str)
def test_has_the_bits_of_the_cpu(case: DeviceCase, run: Run) -> None:
    call = case.make()
    got = run(call)
    assert got.shape == (len(call.tokens), case.shape.hidden)
    before = _core.isa()
    for isa in _core.isas():
        _core.set_isa(isa)
        want = call.on_the_cpu()
        _core.set_isa(before)
        assert same_bits(got, want), isa


@pytest.mark.parametrize("case", FEW_TOKENS[::4], ids=str)
def test_is_the_reference_but_for_activations_of_8_bits(case: DeviceCase, run: Run) -> None:
    call = case.make()
    got, want = run(call), call.expected()
    # Twice a rounding to 1/254 of the largest of 32, which is about 2.5 deviations.
    assert float((got - want).norm() / want.norm()) <= 0.03


def test_numbers_that_are_not_finite_stay_with_their_token(run: Run) -> None:
    call = DeviceCase(ExpertsShape(2, 96, 40, "int4", 64, True), (3, 4)).make()
    clean = run(call)
    call.x[2, 5] = math.nan
    call.x[3, 70] = -math.inf
    call.x[4] = 0.0
    call.x[5] = 1e-38
    call.x[6] = 3e38
    got = run(call)
    spoilt = (call.tokens == 2) | (call.tokens == 3)
    assert spoilt.any()
    assert got[spoilt].isnan().all()
    kept = call.tokens < 2
    assert torch.equal(got[kept], clean[kept])
    assert not got[call.tokens == 4].any()
    assert same_bits(got, call.on_the_cpu())


def test_gates_far_from_zero(run: Run) -> None:
    call = DeviceCase(ExpertsShape(2, 64, 64), (4, 4)).make()
    call.x[:] *= torch.logspace(-6, 6, len(call.x))[:, None]
    assert same_bits(run(call), call.on_the_cpu())


def test_a_token_has_the_same_bits_in_any_company(run: Run) -> None:
    call = DeviceCase(ExpertsShape(2, 64, 64), (5, 6)).make()
    together = run(call)
    for i in (0, 4, 5, 10):
        alone = Call(call.experts, (1,), call.x, call.tokens[i : i + 1])
        last = Call(call.experts, call.counts, call.x, call.tokens)
        expert = int(last.ids[i])
        if expert == call.experts.shape.count - 1:
            assert torch.equal(run(alone)[0], together[i])


def test_shuffled_threads_give_the_same_bits(emulated: tuple[Library, Any]) -> None:
    library, set_schedule = emulated
    call = DeviceCase(ExpertsShape(2, 1056, 34, "int4", 32, True), (2, 3)).make()
    set_schedule(SHUFFLED, 7, 0x3C)
    assert torch.equal(result(library, call), call.on_the_cpu())


def test_no_expert_has_a_token(run: Run) -> None:
    call = DeviceCase(ExpertsShape(2, 64, 32), ()).make()
    assert run(call).shape == (0, 64)


CALL = DeviceCase(ExpertsShape(2, 64, 32), (1, 2)).make()


@pytest.mark.parametrize(
    ("position", "value", "error", "says"),
    [
        (0, ExpertsShape(2, 64, 32, "bf16", 0), ValueError, "shape.format: got 'bf16'"),
        (1, CALL.data.int(), TypeError, "data.dtype: got torch.int32"),
        (1, CALL.data[1:], ValueError, "data: got memory that is not aligned"),
        (1, CALL.data[:-64], ValueError, "offsets: got"),
        (2, [0], ValueError, "offsets: got 1, expected 2"),
        (2, [0, 32], ValueError, "offsets: got 32, expected a multiple of 64"),
        (2, [-64, 0], ValueError, "offsets: got -64"),
        (3, (3, 0), ValueError, "counts: got 0, expected 1 or more"),
        (3, (2, 2), ValueError, r"tokens.shape: got \(3,\), expected \(4,\)"),
        (4, CALL.tokens.float().numpy(), TypeError, "tokens: got float32"),
        (4, CALL.tokens.numpy() + 6, ValueError, "tokens: got"),
        (4, CALL.tokens.numpy() - 7, ValueError, "tokens: got -"),
        (5, CALL.x.bfloat16(), TypeError, "x.dtype: got torch.bfloat16"),
        (5, CALL.x[:, :32], ValueError, "x: got strides"),
        (5, CALL.x[:, :32].contiguous(), ValueError, r"x.shape\[1\]: got 32, expected 64"),
        (5, CALL.x[0], ValueError, "x.ndim: got 1"),
    ],
)
def test_names_the_argument_that_does_not_fit(
    emulated: tuple[Library, Any],
    position: int,
    value: Any,
    error: type[Exception],
    says: str,
) -> None:
    given = list(CALL.arguments)
    given[position] = value
    with pytest.raises(error, match=says):
        emulated[0].call(*given)


def test_tensors_on_the_cpu_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"x\.device: got cpu, expected cuda"):
        few_tokens(*CALL.arguments)
