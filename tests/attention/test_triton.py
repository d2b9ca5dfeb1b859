"""The Triton kernels, interpreted: results and gradients of every kind, mask, dtype and width.

Each test looks at the answer of a worker process (see `interpreted`); all questions of the selected
tests are asked at once.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quernstone.attention import checks, sink_attention

from . import interpreted, test_bad_input, tolerances
from .cases import KINDS, Case
from .interpreted import Ask, Blocks

FP32 = tolerances.gradient(torch.float32)
SMALL: dict[str, Any] = {"batch": 1, "key_heads": 1, "ratio": 2, "queries": 37, "keys": 50}


def masks() -> list[Ask]:
    """Every kind, causal or not, with and without window and padding."""
    asks = []
    for kind, causal, window, padding in product(KINDS, (True, False), (None, 7), ("none", "both")):
        shape = SMALL | ({"batch": 2, "queries": 21, "keys": 35} if padding == "both" else {})
        case = Case(
            kind=kind, causal=causal, window=window, padding=padding, width=16,
            some_tokens=padding == "both", **shape,
        )  # fmt: skip
        asks.append(Ask(interpreted.results_and_gradients, (case,)))
    return asks


def shapes() -> list[Ask]:
    """Widths, padded or not; blocks of any proportion; more queries than keys; decoding."""
    few = SMALL | {"queries": 20, "keys": 20}
    cases = [
        (Case(width=17, **few), Blocks()),
        (Case(width=64, **few), Blocks()),
        (Case(kind="vanilla", width=80, **few), Blocks()),
        (Case(kind="gated by element", width=80, **few), Blocks()),
        (Case(width=128, **few), Blocks()),
        (Case(width=256, **few), Blocks()),
        (Case(kind="vanilla", queries=70, keys=90, ratio=2, key_heads=1), Blocks(32, 16)),
        (Case(queries=70, keys=90, ratio=2, key_heads=1, batch=1), Blocks(16, 32)),
        (Case(queries=70, keys=90, causal=False, window=20, batch=1), Blocks(64, 32)),
        (Case(queries=1, keys=45, ratio=3, width=16), Blocks()),
        *((Case(kind=kind, queries=45, keys=21, width=16, batch=1), Blocks()) for kind in KINDS),
        (Case(scale=-0.3, width=16, **few), Blocks()),
        (Case(kind="vanilla", scale=0.0, width=16, **few), Blocks()),
    ]
    return [Ask(interpreted.results_and_gradients, (case,), blocks) for case, blocks in cases]


def half(dtype: torch.dtype) -> list[Ask]:
    shape = SMALL | {"queries": 23, "keys": 36, "width": 64}
    return [
        Ask(function, (Case(kind=kind, dtype=dtype, **shape),))
        for kind in KINDS
        for function in (
            interpreted.results_and_gradients,
            interpreted.gradients_without_that_of_lse,
        )
    ]


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Iterator[dict[Ask, Future[Any]]]:
    # Spawned: a child that was forked from a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=interpreted.begin) as pool:
        found: dict[Ask, Future[Any]] = {}
        for item in request.session.items:
            if item.path == request.path and isinstance(item, pytest.Function):
                ask = item.callspec.params.get("answer") if hasattr(item, "callspec") else None
                if ask is not None and ask not in found:
                    found[ask] = pool.submit(interpreted.answer, ask)
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def answer(request: pytest.FixtureRequest, answers: dict[Ask, Future[Any]]) -> Any:
    return answers[request.param].result()


def ask(*asks: Ask) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("answer", asks, indirect=True, ids=str)


def assert_small(found: dict[str, float], allowed: float) -> None:
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= allowed}
    assert not wrong, f"off by {wrong}, allowed {allowed:.1e}"


@ask(*masks())
def test_results_and_gradients_under_every_mask(answer: dict[str, float]) -> None:
    assert_small(answer, FP32)


@ask(*shapes())
def test_results_and_gradients_of_any_shape(answer: dict[str, float]) -> None:
    assert_small(answer, FP32)


@ask(*half(torch.float16))
def test_fp16(answer: dict[str, float]) -> None:
    assert_half(answer, torch.float16)


@ask(*half(torch.bfloat16))
def test_bf16_with_products_of_fp32_copies(answer: dict[str, float]) -> None:
    """The roundings of bf16, without its tensor cores: the interpreter cannot multiply bf16."""
    assert_half(answer, torch.bfloat16)


def assert_half(found: dict[str, float], dtype: torch.dtype) -> None:
    allowed = tolerances.gradient(dtype)
    # Three numbers, each a sum over queries of terms of either sign.
    assert_small({"sinks": found.pop("sinks", 0.0)}, 4 * allowed)
    assert_small(found, allowed)


FAR = SMALL | {"queries": 40, "keys": 40, "ratio": 1, "width": 64}


@ask(*(Ask(interpreted.far_sinks, (Case(**FAR), x)) for x in (60.0, -60.0, 78.0)))
def test_sinks_far_from_the_logits(answer: dict[str, float]) -> None:
    assert_small(answer, FP32)


@ask(
    *(Ask(interpreted.saturated, (Case(kind=kind, **FAR), 40.0)) for kind in KINDS[1:]),
    Ask(interpreted.saturated, (Case(kind="vanilla", **FAR), 100.0)),
)  # fmt: skip
def test_saturated_gates(answer: dict[str, float]) -> None:
    assert_small(answer, FP32)


@ask(
    Ask(interpreted.torch_with_one_more_key, (None,)),
    Ask(interpreted.torch_with_one_more_key, (9,)),
)
def test_equals_torch_with_one_more_key(answer: dict[str, float]) -> None:
    assert_small(answer, FP32)


@ask(*(Ask(interpreted.what_a_nan_that_no_query_sees_spoils, (kind,)) for kind in KINDS))
def test_what_no_query_sees_may_hold_nan(answer: list[str]) -> None:
    assert not answer


@ask(Ask(interpreted.names_of_what_changes_from_call_to_call, (Case(padding="both", **SMALL),)))
def test_gradients_have_the_same_bits_in_every_call(answer: list[str]) -> None:
    assert not answer


@ask(Ask(interpreted.names_of_what_strides_change, (Case(kind="gated by element", **SMALL),)))
def test_any_strides(answer: list[str]) -> None:
    assert not answer


@ask(Ask(interpreted.results_of_empty_calls, ()))
def test_calls_without_batch_queries_or_keys(answer: list[str]) -> None:
    assert not answer


@ask(Ask(interpreted.importance_for_two_block_sizes, (Case(kind="gated", **SMALL),)))
def test_importance_does_not_depend_on_the_block_size(answer: bool) -> None:
    assert answer


def test_importing_the_package_does_not_import_triton() -> None:
    program = "import sys, quernstone.attention; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_triton_is_named() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from quernstone.attention import cuda_op\n"
        "try: cuda_op._triton_op()\n"
        "except ImportError as error: sys.exit('pip install triton' not in str(error))\n"
        "sys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_this_process_does_not_interpret() -> None:
    assert "TRITON_INTERPRET" not in os.environ


def test_torch_knows_the_shapes_of_a_cuda_call() -> None:
    """Without gradients: autograd itself asks for a CUDA runtime."""
    shape = {"device": "cuda", "dtype": torch.float16}
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 5, 16, **shape), torch.empty(2, 2, 7, 16, **shape)
        gate = torch.empty(2, 4, 5, **shape)
        out, aux = sink_attention(q, k, k, kind="gated", gate=gate, return_aux=True)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        assert (aux.lse.shape, aux.lse.dtype) == ((2, 4, 5), torch.float32)
        assert (aux.importance.shape, aux.importance.device) == ((4,), q.device)
        saved = (out, aux.lse, aux.importance, out, aux.lse, None)
        gradients = torch.ops.quernstone.sink_attention_backward(
            *saved, q, k, k, "gated", None, gate, *(True, None, None), *(None,) * 3
        )
        assert [x.dtype for x in gradients] == [*(q.dtype,) * 3, torch.float32, q.dtype]
        assert {x.device for x in gradients} == {q.device}
        with pytest.raises(ValueError, match=r"v\.device: got cpu, expected cuda:0"):
            sink_attention(q, k, torch.empty(2, 2, 7, 16), kind="gated", gate=gate)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("sink", {"q": torch.zeros(4, 5, 16)}),
    ("sink", {"k": torch.zeros(1, 2, 2, 7, 16)}),
    ("sink", {"k": torch.zeros(1, 2, 7, 16)}),
    ("sink", {"v": torch.zeros(3, 2, 7, 16)}),
    ("sink", {"v": torch.zeros(2, 1, 7, 16)}),
    ("sink", {"v": torch.zeros(2, 2, 6, 16)}),
    ("sink", {"k": torch.zeros(2, 2, 7, 17)}),
    ("sink", {"v": torch.zeros(2, 2, 7, 32)}),
    ("sink", {"k": torch.zeros(2, 3, 7, 16), "v": torch.zeros(2, 3, 7, 16)}),
    ("sink", {"k": torch.zeros(2, 0, 7, 16), "v": torch.zeros(2, 0, 7, 16)}),
    ("sink", {name: torch.zeros(2, 4, 7, 15) for name in "qkv"}),
    ("sink", {name: torch.zeros(2, 4, 7, 257) for name in "qkv"}),
    ("sink", {"k": torch.zeros(2, 2, 7, 16, dtype=torch.bfloat16)}),
    ("sink", {"v": torch.zeros(2, 2, 7, 16, dtype=torch.float64)}),
    ("sink", {"sinks": None}),
    ("sink", {"sinks": torch.zeros(1, 4)}),
    ("sink", {"sinks": torch.zeros(2)}),
    ("sink", {"sinks": torch.zeros(4, dtype=torch.float64)}),
    ("vanilla", {"sinks": torch.zeros(4)}),
    ("gated", {"gate": None}),
    ("sink", {"gate": torch.zeros(2, 4, 5)}),
    ("gated", {"gate": torch.zeros(2, 4)}),
    ("gated", {"gate": torch.zeros(1, 4, 5)}),
    ("gated", {"gate": torch.zeros(2, 2, 5)}),
    ("gated", {"gate": torch.zeros(2, 4, 7)}),
    ("gated", {"gate": torch.zeros(2, 4, 5, 17)}),
    ("gated", {"gate": torch.zeros(2, 4, 5, dtype=torch.bfloat16)}),
    ("sink", {"window": 0}),
    ("sink", {"scale": float("nan")}),
    ("sink", {"scale": 1e39}),
    ("sink", {"key_start": torch.zeros(2, 1, dtype=torch.int64)}),
    ("sink", {"key_start": torch.zeros(1, dtype=torch.int64)}),
    ("sink", {"key_lengths": torch.zeros(2, dtype=torch.bool)}),
    ("sink", {"key_lengths": torch.zeros(3, dtype=torch.int32)}),
    ("sink", {"token_mask": torch.ones(5, dtype=torch.bool)}),
    ("sink", {"token_mask": torch.ones(2, 7, dtype=torch.bool)}),
    ("sink", {"token_mask": torch.ones(2, 5)}),
]


@pytest.mark.parametrize(("kind", "change"), BAD)
def test_refuses_in_the_words_of_the_cpu_operator(kind: str, change: dict[str, Any]) -> None:
    call = test_bad_input.good(kind) | change
    with pytest.raises(ValueError, match=r": got .*, expected ") as theirs:
        sink_attention(**call, return_aux=True)
    names = (
        *("q", "k", "v", "kind", "sinks", "gate", "window", "scale"),
        *("key_start", "key_lengths", "token_mask"),
    )
    dtypes = (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match=r": got .*, expected ") as ours:
        checks.check_call(*(call.get(name) for name in names), dtypes)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "name", ["k", "v", "sinks", "gate", "key_start", "key_lengths", "token_mask"]
)
def test_names_the_tensor_on_another_device(name: str) -> None:
    call = test_bad_input.good("gated" if name == "gate" else "sink")
    call["key_start"] = call["key_lengths"] = torch.zeros(2, dtype=torch.int64)
    call["token_mask"] = torch.ones(2, 5, dtype=torch.bool)
    call[name] = call[name].to("meta")
    names = ("q", "k", "v", "kind", "sinks", "gate", "window", "scale")
    others = (call["key_start"], call["key_lengths"], call["token_mask"])
    with pytest.raises(ValueError, match=f"{name}.device: got meta, expected cpu"):
        checks.check_call(*(call.get(x) for x in names), *others, (torch.float32,))
