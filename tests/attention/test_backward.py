"""Gradients: the reference's, those of other implementations, and what autograd asks of an op."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quernstone.attention import reference, sink_attention

from . import oracles, tolerances
from .cases import DTYPES, KINDS, PADDINGS, Case, split
from .gradients import call_errors, errors, ours
from .tolerances import relative_error

FP32 = tolerances.gradient(torch.float32)
BF16 = tolerances.gradient(torch.bfloat16)


def assert_small(found: dict[str, float], label: str, allowed: float = FP32) -> None:
    wrong = {name: f"{error:.1e}" for name, error in found.items() if error > allowed}
    assert not wrong, f"{label}: off by {wrong}, allowed {allowed:.1e}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(
    isa: str, kind: str, causal: bool, window: int | None, padding: str
) -> None:
    case = Case(
        kind=kind,
        causal=causal,
        window=window,
        padding=padding,
        ratio=2,
        queries=75,
        keys=160,
        some_tokens=True,
    )
    assert_small(errors(case), str(case))


@pytest.mark.parametrize("width", [16, 17, 40, 64, 100, 128, 256])
@pytest.mark.parametrize("queries", [1, 3, 64, 65])
def test_any_width_and_number_of_queries(isa: str, queries: int, width: int) -> None:
    case = Case(queries=queries, keys=70, width=width, ratio=3)
    assert_small(errors(case), str(case))


def test_more_queries_than_keys_and_rows_that_see_nothing(isa: str) -> None:
    for kind in KINDS:
        case = Case(kind=kind, queries=90, keys=31, padding="start")
        assert_small(errors(case), str(case))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gradients(isa: str, kind: str) -> None:
    for case in (
        Case(kind=kind, ratio=2, queries=150, keys=150, width=64),
        Case(kind=kind, ratio=3, queries=75, keys=161, width=40, padding="both", some_tokens=True),
        Case(kind=kind, causal=False, window=9, queries=70, keys=301, width=17),
        Case(kind=kind, queries=90, keys=31, width=100, padding="start"),
    ):
        bf16 = replace(case, dtype=torch.bfloat16)
        assert_small(errors(bf16), str(bf16), BF16)


@pytest.mark.parametrize("sink", [-60.0, 60.0])
def test_sinks_far_from_the_logits(isa: str, sink: float) -> None:
    tensors, options = Case(ratio=2, queries=100, keys=100, width=64).make()
    options["sinks"] = options["sinks"] + sink
    assert_small(call_errors(tensors, options), f"sink {sink}")


@pytest.mark.parametrize("kind", ["gated", "gated by element"])
def test_saturated_gates(isa: str, kind: str) -> None:
    tensors, options = Case(kind=kind, queries=100, keys=100, width=64).make()
    options["gate"] = 40.0 * options["gate"]
    assert_small(call_errors(tensors, options), kind)


@pytest.mark.parametrize("shift", [-12.0, 12.0])
@pytest.mark.parametrize("kind", ["sink", "vanilla"])
def test_the_importance_alone_of_saturated_gates(isa: str, kind: str, shift: float) -> None:
    """1 - exp(...) in place of the sigmoid would give zeros or noise here."""
    (q, k, v), options = Case(kind=kind, queries=100, keys=100, width=64).make()
    if kind == "sink":
        options["sinks"] = options["sinks"] + shift
    else:
        # The first key stands far above or below all others, for every query.
        k[:, :, 0] = 0.0
        q[..., 0] = 1.0
        k[:, :, 0, 0] = shift * 8.0
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    twins = [x.double().requires_grad_() for x in (q, k)]
    weights = torch.randn(q.shape[1])
    _, aux = split(sink_attention(*leaves, v, **options))
    _, want = split(reference.sink_attention(*twins, v, **options))
    assert aux is not None
    assert want is not None
    got = torch.autograd.grad((aux.importance * weights).sum(), leaves)
    wanted = torch.autograd.grad((want.importance * weights.double()).sum(), twins)
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) <= FP32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_keys_and_its_neighbours_stay_clean(isa: str, dtype: torch.dtype) -> None:
    (q, k, v), options = Case(queries=40, keys=40, batch=1, dtype=dtype).make()
    options["key_start"] = torch.tensor([21])
    options["key_lengths"] = torch.tensor([37])
    for hidden in (slice(0, 21), slice(37, 40)):
        k[:, :, hidden] = float("nan")
        v[:, :, hidden] = float("inf")
    q[:, :, :21] = float("nan")
    got, _ = ours((q, k, v), options)
    for name, gradient in got.items():
        assert gradient.isfinite().all(), name
    for name in "qkv":
        assert not got[name][:, :, :21].any(), name
    for name in "kv":
        assert not got[name][:, :, 37:].any(), name


@pytest.mark.parametrize("window", [None, 9])
def test_sink_gradients_are_those_of_gpt_oss_eager(window: int | None) -> None:
    (q, k, v), options = Case(ratio=2, queries=90, keys=90, width=64, aux=False).make()
    options["window"] = window
    weights = torch.randn(q.shape)
    leaves = [x.requires_grad_() for x in (q, k, v, options["sinks"])]
    want = torch.autograd.grad(
        (oracles.gpt_oss_eager(*leaves, window=window) * weights).sum(), leaves
    )
    out, _ = split(sink_attention(q, k, v, **options))
    got = torch.autograd.grad((out * weights).sum(), leaves)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) <= FP32


def test_sink_gradients_are_those_of_torch_with_one_more_key() -> None:
    (q, k, v), options = Case(ratio=2, queries=50, keys=90, causal=False, aux=False).make()
    weights = torch.randn(q.shape)
    leaves = [x.requires_grad_() for x in (q, k, v, options["sinks"])]
    seen = torch.ones(1, 1, 50, 90, dtype=torch.bool)
    want = torch.autograd.grad(
        (oracles.torch_sdpa(q, k, v, seen, options["sinks"]) * weights).sum(), leaves
    )
    out, _ = split(sink_attention(q, k, v, **options))
    got = torch.autograd.grad((out * weights).sum(), leaves)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) <= FP32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_do_not_depend_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    for kind, causal in (("sink", True), ("vanilla", False)):
        case = Case(
            kind=kind, dtype=dtype, causal=causal, batch=1, key_heads=3, queries=400, keys=500
        )
        tensors, options = case.make()
        torch.set_num_threads(1)
        want, _ = ours(tensors, options)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            got, _ = ours(tensors, options)
            for name in want:
                assert torch.equal(got[name], want[name]), f"{name}, {threads} threads"


def test_every_gradient_is_written_under_deterministic_algorithms(isa: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS:
            case = Case(kind=kind, batch=3, ratio=3, queries=37, keys=37, padding="both")
            tensors, options = case.make()
            got, _ = ours(tensors, options)
            again, _ = ours(tensors, options)
            for name, gradient in got.items():
                assert gradient.isfinite().all(), name
                assert torch.equal(gradient, again[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("part", ["out", "lse", "importance"])
def test_each_result_alone_has_a_gradient(part: str) -> None:
    for kind in ("sink", "vanilla", "gated"):
        tensors, options = Case(kind=kind, queries=30, keys=30).make()
        leaf = tensors[0].clone().requires_grad_()
        twin = tensors[0].double().requires_grad_()
        results = []
        for q, f in ((leaf, sink_attention), (twin, reference.sink_attention)):
            out, aux = split(f(q, *tensors[1:], **options))
            assert aux is not None
            result = {"out": out, "lse": aux.lse, "importance": aux.importance}[part]
            if kind == "gated" and part == "importance":
                # The gate is an input of its own: no way from its mean to the queries.
                continue
            results.append(torch.autograd.grad(result.square().sum(), q)[0])
        if results:
            assert relative_error(*results) <= 2 * FP32


def test_incoming_gradients_of_any_layout() -> None:
    tensors, options = Case(queries=40, keys=40, width=48, ratio=2).make()

    def run(spread: Any) -> Tensor:
        leaf = tensors[0].clone().requires_grad_()
        out, aux = split(sink_attention(leaf, *tensors[1:], **options))
        assert aux is not None
        gradients = [spread(out), spread(aux.lse)]
        (got,) = torch.autograd.grad([out, aux.lse], leaf, gradients)
        return got

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def expanded(x: Tensor) -> Tensor:
        return torch.ones(()).expand(x.shape)

    def transposed(x: Tensor) -> Tensor:
        return torch.ones(x.shape[::-1]).permute(*range(x.ndim - 1, -1, -1))

    want = run(ones)
    assert torch.equal(run(expanded), want)
    assert torch.equal(run(transposed), want)


def test_strided_inputs_have_the_same_gradients() -> None:
    (q, k, v), options = Case(queries=60, keys=60, width=48, ratio=2).make()
    want, _ = ours((q, k, v), options)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    got, _ = ours((q.mT.contiguous().mT, k, v), options)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_sinks_in_bf16_have_gradients_summed_in_fp32() -> None:
    case = Case(dtype=torch.bfloat16, queries=300, keys=300)
    tensors, options = case.make()
    assert options["sinks"].dtype is torch.bfloat16
    got, _ = ours(tensors, options)
    options["sinks"] = options["sinks"].float()
    want, _ = ours(tensors, options)
    assert torch.equal(got["sinks"], want["sinks"].bfloat16())


def test_only_what_requires_grad_gets_a_gradient() -> None:
    (q, k, v), options = Case(queries=20, keys=20).make()
    k.requires_grad_()
    out, aux = split(sink_attention(q, k, v, **options))
    assert out.requires_grad
    assert aux is not None
    assert aux.lse.requires_grad
    assert aux.importance.requires_grad
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None


def test_no_gradient_is_recorded_under_no_grad() -> None:
    (q, k, v), options = Case(queries=20, keys=20).make()
    q.requires_grad_()
    with torch.no_grad():
        out, aux = split(sink_attention(q, k, v, **options))
    assert not out.requires_grad
    assert aux is not None
    assert not aux.importance.requires_grad


def test_the_training_call_gives_the_bits_of_the_plain_one() -> None:
    for kind in KINDS:
        (q, k, v), options = Case(kind=kind, ratio=2, queries=50, keys=70).make()
        want, want_aux = split(sink_attention(q, k, v, **options))
        got, aux = split(sink_attention(q.clone().requires_grad_(), k, v, **options))
        assert torch.equal(got, want)
        assert aux is not None
        assert want_aux is not None
        assert torch.equal(aux.lse, want_aux.lse)
        assert torch.equal(aux.importance, want_aux.importance)


def test_second_gradients_are_refused_by_name() -> None:
    (q, k, v), options = Case(queries=10, keys=10, aux=False).make()
    q.requires_grad_()
    out, _ = split(sink_attention(q, k, v, **options))
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of its gradient"):
        torch.autograd.grad(first.sum(), q)


def test_checkpointing_gives_the_same_gradients() -> None:
    (q, k, v), options = Case(queries=40, keys=40, aux=False).make()
    q.requires_grad_()
    out, _ = split(sink_attention(q, k, v, **options))
    (want,) = torch.autograd.grad(out.square().sum(), q)

    def block(x: Tensor) -> Tensor:
        return split(sink_attention(x, k, v, **options))[0]

    again = checkpoint(block, q, use_reentrant=False)
    (got,) = torch.autograd.grad(again.square().sum(), q)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
class TestInsideTorch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_passes_opcheck(self, kind: str) -> None:
        case = Case(kind=kind, ratio=2, queries=5, keys=9, width=16, some_tokens=True)
        tensors, options = case.make()
        del options["return_aux"]
        leaves = tuple(x.requires_grad_() for x in tensors)
        for name in ("sinks", "gate"):
            if name in options:
                options[name].requires_grad_()
        torch.library.opcheck(torch.ops.quernstone.sink_attention_training.default, leaves, options)

    @pytest.mark.parametrize("kind", KINDS)
    def test_compiles_as_one_graph_forward_and_backward(self, kind: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(sink_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        for queries, keys in ((7, 7), (9, 20), (33, 40)):
            case = Case(kind=kind, ratio=2, queries=queries, keys=keys, padding="both")
            tensors, options = case.make()
            gradients = []
            for f in (sink_attention, compiled):
                leaves = [x.clone().requires_grad_() for x in tensors]
                out, aux = split(f(*leaves, **options))
                assert aux is not None
                total = out.square().sum() + aux.importance.square().sum()
                gradients.append(torch.autograd.grad(total, leaves))
            for got, want in zip(*gradients, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dout": torch.zeros(2, 2, 5, 8)}, "dout.shape"),
        ({"dout": torch.zeros(2, 2, 5, 16, dtype=torch.bfloat16)}, "dout.dtype"),
        ({"dlse": torch.zeros(2, 2, 4)}, "dlse.shape"),
        ({"dimportance": torch.zeros(3)}, "dimportance.shape"),
        ({"lse": torch.zeros(2, 2)}, "lse.ndim"),
    ],
)
def test_the_backward_operator_names_what_does_not_fit(change: dict[str, Any], says: str) -> None:
    (q, k, v), options = Case(queries=5, keys=5, width=16).make()
    op = torch.ops.quernstone
    out, lse, _, _ = op.sink_attention_training(q, k, v, "sink", options["sinks"])
    call = {
        "dout": torch.zeros_like(out),
        "dlse": None,
        "dimportance": None,
        "out": out,
        "lse": lse,
        "gate_logit": None,
    } | change
    with pytest.raises(ValueError, match=says):
        op.sink_attention_backward(
            *call.values(), q, k, v, "sink", options["sinks"], *(None, True), *(None,) * 5
        )
