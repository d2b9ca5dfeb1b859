"""A layer of a runtime on an emulated device is one call of an operator: what it takes, refuses and
tells of."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.moe import EmulatedDevice, Experts, Runtime
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

STEP = torch.ops.quernstone.moe_step.default
# The CPU is slow and the bus quick, so that a layer which finds its experts on the device leaves
# time to fetch another's.
ROOM = replace(COSTS, scale=50.0, transfer=COSTS.transfer / 100)


@pytest.fixture(scope="module")
def layers() -> dict[str, Experts]:
    return make_layers()


def opened(layers: dict[str, Experts], costs: Any = COSTS, **how: Any) -> Runtime:
    return Runtime(layers, EmulatedDevice(costs, factor=AT_ONCE), cache="lru", **how)


def number(runtime: Runtime, layer: int = 0) -> int:
    return runtime._steps[layer].number


def with_room(layers: dict[str, Experts]) -> Runtime:
    """The first layer has all that a call needs, and fetches for the second, which has nothing."""
    runtime = opened(layers, ROOM, slots=[COUNT, TOP, TOP], prefetch=1)
    runtime.place("first", range(COUNT))
    runtime.place("second", [])
    return runtime


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, i, w: (x, i + COUNT, w), ValueError, "ids: got"),
        (lambda x, i, w: (x, i * 0 - 2, w), ValueError, "ids: got -2"),
        (lambda x, i, w: (x, i * 0, w), ValueError, "ids: an expert twice"),
        (lambda x, i, w: (x, i[:1], w), ValueError, r"ids.shape\[0\]: got 1, expected 2"),
        (lambda x, i, w: (x, i, w / 0), ValueError, "weights: got a number that is not finite"),
        (lambda x, i, w: (x, i, w * torch.nan), ValueError, "weights: got a number"),
        (lambda x, i, w: (x, i, w.double()), TypeError, "weights.dtype: got torch.float64"),
        (lambda x, i, w: (x[:, :8], i, w), ValueError, r"x.shape\[1\]: got 8"),
        (lambda x, i, w: (x.tolist(), i, w), TypeError, "x: got list, expected a Tensor"),
    ],
)
def test_a_call_that_is_refused_leaves_the_device_as_it_was(
    layers: dict[str, Experts],
    change: Callable[..., Any],
    error: type[Exception],
    message: str,
    prefetch: int,
) -> None:
    x, _, _, scores = make_call(torch.Generator().manual_seed(1), 2)
    weights, ids = scores.topk(TOP)
    want = layers["first"](x, ids, weights)
    with opened(layers, slots=TOP, prefetch=prefetch) as runtime:
        module = runtime.layer("first")
        module(x, ids, weights)
        before = {name: runtime.resident(name) for name in NAMES}
        assert before["first"]
        for _ in range(2):
            with pytest.raises(error, match=message):
                module(*change(x, ids, weights))
            assert {name: runtime.resident(name) for name in NAMES} == before
        assert torch.equal(module(x, ids, weights), want)


class Lost(Exception):
    """Nobody else raises it."""


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("error", [Lost("router"), KeyboardInterrupt(), MemoryError("router")])
def test_an_exception_of_a_router_arrives_as_itself_and_the_next_call_is_right(
    layers: dict[str, Experts], error: BaseException, tokens: int
) -> None:
    call = make_call(torch.Generator().manual_seed(6), tokens)
    armed = True

    def router_that_raises(hidden: Tensor) -> Tensor:
        if armed:
            raise error
        return hidden.new_zeros(len(hidden), COUNT)

    with with_room(layers) as runtime:
        runtime.set_router("second", router_that_raises)
        with pytest.raises(type(error)) as caught:
            runtime.layer("first")(*call)
        assert caught.value is error
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert frames[-1].name == "router_that_raises"
        # What was under way was given up.
        assert [runtime.resident(name) for name in NAMES] == [[], [], []]
        armed = False
        for name in (*NAMES, *NAMES):
            assert torch.equal(runtime.layer(name)(*call), layers[name](*call[:3]))


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        (lambda x: None, AttributeError, "topk"),
        (lambda x: x[:, :2], RuntimeError, "range"),
        (lambda x: torch.arange(100.0).expand(len(x), 100), ValueError, "ids: got 99"),
    ],
)
def test_a_router_that_is_none_is_told_of_and_the_next_call_is_right(
    layers: dict[str, Experts], router: Any, error: type[Exception], message: str
) -> None:
    call = make_call(torch.Generator().manual_seed(6), 1)
    with with_room(layers) as runtime:
        runtime.set_router("second", router)
        with pytest.raises(error, match=message):
            runtime.layer("first")(*call)
        for name in NAMES[1:]:
            assert torch.equal(runtime.layer(name)(*call), layers[name](*call[:3]))
        runtime.set_router("second", torch.zeros(COUNT, HIDDEN))
        assert torch.equal(runtime.layer("first")(*call), layers["first"](*call[:3]))


@pytest.mark.parametrize("rows", [COUNT, COUNT - 2])
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_a_matrix_fetches_what_the_same_router_as_a_function_does(
    layers: dict[str, Experts], tokens: int, rows: int
) -> None:
    fetched: set[int] = set()
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        x, ids, weights, scores = make_call(generator, tokens)
        call = (x[:1] + x / 100, ids, weights, scores)  # tokens that the router tells hardly apart
        matrix = torch.randn(rows, HIDDEN, generator=generator)
        found = []

        def function(hidden: Tensor, matrix: Tensor = matrix) -> Tensor:
            always = torch.full((len(hidden), COUNT - len(matrix)), torch.inf)
            return torch.cat([hidden @ matrix.T, always], 1)

        for router in (matrix, function):
            with with_room(layers) as runtime:
                runtime.set_router("second", router)
                got = runtime.layer("first")(*call)
                assert torch.equal(got, layers["first"](*call[:3]))
                found.append(runtime.resident("second"))
        assert found[0]
        assert found[0] == found[1]
        fetched |= set(found[0])
    assert len(fetched) >= TOP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_strides_and_with_gradients_give_the_experts_bits(
    layers: dict[str, Experts], dtype: torch.dtype
) -> None:
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(5), 6)
    x = x.to(dtype)
    want = layers["second"](x, ids, weights)
    wide = torch.full((6, 2 * HIDDEN), torch.nan, dtype=dtype)
    wide[:, ::2] = x
    rows = torch.full((12, HIDDEN), torch.nan, dtype=dtype)
    rows[::2] = x
    with opened(layers, slots=3, prefetch=1) as runtime:
        runtime.set_router("third", torch.eye(COUNT, HIDDEN))
        module = runtime.layer("second")
        for given in (x, wide[:, ::2], rows[::2], x.T.contiguous().T):
            assert torch.equal(given, x)
            got = module(given, ids, weights, scores)
            assert got.dtype == dtype
            assert torch.equal(got, want)
        strided = (ids.T.contiguous().T, weights.repeat_interleave(2, 1)[:, ::2])
        assert torch.equal(module(x, *strided, scores.T.contiguous().T), want)
        assert torch.equal(module(x, ids, weights, scores.double()), want)
        learnt = [of.clone().requires_grad_() for of in (x, weights, scores)]
        for which in range(3):
            some = [x, weights, scores]
            some[which] = learnt[which]
            got = module(some[0], ids, some[1], some[2])
            assert not got.requires_grad
            assert torch.equal(got, want)
        one = x[:1].expand(6, HIDDEN)
        assert torch.equal(module(one, ids, weights), layers["second"](one, ids, weights))


def test_a_number_that_no_open_runtime_has_is_refused(layers: dict[str, Experts]) -> None:
    x, ids, weights, _ = make_call(torch.Generator().manual_seed(1), 2)
    with opened(layers) as runtime:
        numbers = [number(runtime, layer) for layer in range(len(NAMES))]
        assert len(set(numbers)) == len(NAMES)
        for name, of in zip(NAMES, numbers, strict=True):
            assert torch.equal(STEP(x, ids, weights, None, of), layers[name](x, ids, weights))
        for junk in (0, -1, max(numbers) + 1, 2**63 - 1, -(2**63)):
            with pytest.raises(ValueError, match=f"step: got {junk}, expected that of an open"):
                STEP(x, ids, weights, None, junk)
    for closed in numbers:
        with pytest.raises(ValueError, match=f"step: got {closed}, expected that of an open"):
            STEP(x, ids, weights, None, closed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w, s: (x[0], i, w, s), "x.ndim: got 1, expected 2"),
        (lambda x, i, w, s: (x.double(), i, w, s), "x.dtype: got torch.float64"),
        (lambda x, i, w, s: (x.bfloat16(), i, w, s), "x.dtype: got torch.bfloat16"),
        (lambda x, i, w, s: (x.T.contiguous().T, i, w, s), "x: got a strided last axis"),
        (lambda x, i, w, s: (x[:, 1:], i, w, s), r"x.shape\[1\]: got 39, expected 40"),
        (lambda x, i, w, s: (x[1:], i, w, s), r"ids.shape\[0\]: got 2, expected 1"),
        (lambda x, i, w, s: (x, i.int(), w, s), "ids.dtype: got torch.int32"),
        (lambda x, i, w, s: (x, i[0], w, s), "ids.ndim: got 1"),
        (lambda x, i, w, s: (x, i, w[:, 1:], s), r"weights.shape\[1\]: got 2, expected 3"),
        (lambda x, i, w, s: (x, i, w[1:], s), r"weights.shape\[0\]: got 1, expected 2"),
        (lambda x, i, w, s: (x, i, w.half(), s), "weights.dtype: got torch.float16"),
        (lambda x, i, w, s: (x, i, w, s.double()), "scores.dtype: got torch.float64"),
        (lambda x, i, w, s: (x, i, w, s[0]), "scores.ndim: got 1"),
    ],
)
def test_the_operator_refuses_by_name_what_it_cannot_take(
    layers: dict[str, Experts], change: Callable[..., Any], message: str
) -> None:
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(1), 2)
    with opened(layers) as runtime:
        with pytest.raises(ValueError, match=message):
            STEP(*change(x, ids, weights, scores), number(runtime))
        got = STEP(x, ids, weights, scores, number(runtime))
    assert torch.equal(got, layers["first"](x, ids, weights))


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_token_of_nan_is_asked_about_like_any_other(
    layers: dict[str, Experts], tokens: int
) -> None:
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(2), tokens)
    bad = x.clone()
    bad[-1] = torch.nan
    with with_room(layers) as runtime:
        runtime.set_router("second", torch.ones(COUNT, HIDDEN))
        got = runtime.layer("first")(bad, ids, weights, scores)
        assert bool(got[-1].isnan().all())
        assert torch.equal(got[:-1], layers["first"](x, ids, weights)[:-1])
        assert runtime.resident("second")
        assert torch.equal(
            runtime.layer("first")(x, ids, weights), layers["first"](x, ids, weights)
        )


def test_the_operators_schema_and_shapes_are_what_it_does(layers: dict[str, Experts]) -> None:
    x, ids, weights, scores = make_call(torch.Generator().manual_seed(2), 3)
    with opened(layers) as runtime:
        for given in (scores, None):
            torch.library.opcheck(STEP, (x, ids, weights, given, number(runtime)))
