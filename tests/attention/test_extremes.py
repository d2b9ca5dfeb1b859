"""Sinks of +-60, saturated gates, rows without keys, huge logits, NaN and infinity."""

import math

import pytest
import torch

from quernstone.attention import reference, sink_attention

from . import tolerances
from .cases import DTYPES, KINDS, Case, check, check_call, split

NEVER = -math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [60.0, -60.0, 30.0, -30.0, 78.0, -78.0])
def test_large_sinks_neither_overflow_nor_lose_the_gate(
    isa: str, dtype: torch.dtype, size: float
) -> None:
    (q, k, v), options = Case(dtype=dtype, ratio=2, queries=40, keys=70).make()
    options["sinks"] = torch.full((4,), size)
    # G is as exact as the difference of two numbers as large as the sink.
    check_call(q, k, v, logit_sd=1 + abs(size) / 10, label=f"sink {size}", **options)


@pytest.mark.parametrize("size", [500.0, 1e30, torch.finfo(torch.float32).max])
def test_an_enormous_sink_takes_all_or_nothing(isa: str, size: float) -> None:
    (q, k, v), options = Case(ratio=2, queries=40, keys=70).make()
    out, aux = split(sink_attention(q, k, v, **(options | {"sinks": torch.full((4,), size)})))
    assert aux is not None
    assert out.abs().max() <= tolerances.UNDERFLOW
    assert aux.importance.abs().max() <= tolerances.UNDERFLOW
    check_call(q, k, v, **(options | {"sinks": torch.full((4,), -size)}))


def test_each_head_has_its_own_sink(isa: str) -> None:
    (q, k, v), options = Case(ratio=4, queries=40, keys=70).make()
    options["sinks"] = torch.tensor([NEVER, -60.0, 60.0, 0.0, 5.0, NEVER, -3.0, 20.0])
    check_call(q, k, v, logit_sd=7.0, **options)


@pytest.mark.parametrize("first", [20.0, 60.0, -60.0])
def test_the_vanilla_gate_survives_saturation(isa: str, first: float) -> None:
    """The gate's weight of the first key is within 1e-8 or 1e-26 of 1, or of 0."""
    q = torch.ones(1, 1, 40, 16)
    k = torch.randn(1, 1, 40, 16) / 4
    k[:, :, 0] = first / 16
    v = torch.randn(1, 1, 40, 16)
    for t in (1, 7, 39):
        token = torch.arange(40)[None] == t
        check_call(
            q, k, v, kind="vanilla", scale=1.0, token_mask=token, return_aux=True,
            logit_sd=abs(first) / 4, label=f"token {t}",
        )  # fmt: skip


def test_the_first_token_of_the_vanilla_kind_has_gate_zero_and_does_not_count(isa: str) -> None:
    (q, k, v), options = Case(kind="vanilla", queries=30, keys=30).make()
    out, aux = check_call(q, k, v, **options)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0], rtol=tolerances.output(q.dtype), atol=0.0)
    alone = torch.arange(30).expand(2, 30) == 0
    _, aux = split(sink_attention(q, k, v, **(options | {"token_mask": alone})))
    assert aux is not None
    assert not aux.importance.any()


def test_a_window_that_has_left_the_first_key_behind_gives_a_vanilla_gate_of_one(isa: str) -> None:
    (q, k, v), options = Case(kind="vanilla", queries=60, keys=60, window=8).make()
    late = torch.arange(60).expand(2, 60) >= 8
    _, aux = split(sink_attention(q, k, v, **(options | {"token_mask": late})))
    assert aux is not None
    allowed = tolerances.gate(0.0, 32)
    torch.testing.assert_close(aux.importance, torch.ones(2), rtol=allowed, atol=0.0)


@pytest.mark.parametrize("kind", ["gated", "gated by element"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [60.0, -60.0, 86.0, -86.0, 1e4, -1e4, math.inf, NEVER])
def test_saturated_gates_are_sigmoids_still(
    isa: str, kind: str, dtype: torch.dtype, size: float
) -> None:
    (q, k, v), options = Case(kind=kind, dtype=dtype, queries=30, keys=30).make()
    options["gate"] = torch.full_like(options["gate"], size)
    if abs(size) < 87:
        check_call(q, k, v, logit_sd=1 + abs(size) / 10, **options)
        return
    # Below 1e-37 the sigmoid is 0 or the smallest numbers there are.
    out, aux = split(sink_attention(q, k, v, **options))
    plain = sink_attention(q, k, v, kind="vanilla")
    gate = float(size > 0)
    assert aux is not None
    allowed = 2 * tolerances.output(dtype) * plain.abs().max().item()
    torch.testing.assert_close(out, gate * plain, rtol=0.0, atol=gate * allowed + 1e-37)
    torch.testing.assert_close(aux.importance, torch.full((2,), gate), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_key_are_zero(isa: str, kind: str, dtype: torch.dtype) -> None:
    (q, k, v), options = Case(kind=kind, dtype=dtype, batch=5, queries=40, keys=40).make()
    options["key_start"] = torch.tensor([0, 40, 17, 30, 39])
    options["key_lengths"] = torch.tensor([0, 40, 17, 10, 40])
    out, aux = check_call(q, k, v, **options)
    assert aux is not None
    assert not out[:4].any()
    assert (aux.lse[:4] == NEVER).all()
    assert out[4, :, 39].any()


@pytest.mark.parametrize("kind", KINDS)
def test_importance_without_a_counted_token_is_zero(isa: str, kind: str) -> None:
    case = Case(kind=kind, queries=40, keys=40, padding="start")
    (q, k, v), options = case.make()
    nobody = torch.zeros(2, 40, dtype=torch.bool)
    _, aux = split(sink_attention(q, k, v, **(options | {"token_mask": nobody})))
    assert aux is not None
    assert not aux.importance.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sd", [5.0, 20.0, 60.0])
def test_huge_logits(isa: str, kind: str, dtype: torch.dtype, sd: float) -> None:
    check(Case(kind=kind, dtype=dtype, queries=70, keys=130, width=64, sd=sd))
    check(Case(kind=kind, dtype=dtype, queries=70, keys=130, width=64, sd=sd, scale=-0.125))


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-30, 1.0, -1.0, 3.0])
def test_any_finite_scale(isa: str, scale: float) -> None:
    for kind in KINDS:
        check(Case(kind=kind, queries=33, keys=65, width=16, scale=scale))


def masks(case: Case) -> torch.Tensor:
    """bool [b or 1, 1, t, s] of a case."""
    _, options = case.make()
    names = ("causal", "window", "key_start", "key_lengths")
    mask = {name: options[name] for name in names if name in options}
    return reference.visible(case.queries, case.keys, **mask)


SPOILT = [
    {},
    {"window": 9},
    {"causal": False, "window": 9},
    {"causal": False, "padding": "both"},
    {"queries": 3},
    {"queries": 100, "keys": 60},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", SPOILT, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, NEVER])
def test_a_spoilt_value_reaches_only_the_rows_that_see_it(
    isa: str, dtype: torch.dtype, mask: dict[str, object], value: float
) -> None:
    shape = {"queries": 61, "keys": 61, "ratio": 2} | mask
    case = Case(dtype=dtype, **shape)  # type: ignore[arg-type]
    (q, k, v), options = case.make()
    clean, clean_aux = split(sink_attention(q, k, v, **options))
    assert clean_aux is not None
    for key in (0, 13, 31, case.keys - 1):
        spoilt = v.clone()
        spoilt[:, 0, key, 5] = value
        out, aux = split(sink_attention(q, k, spoilt, **options))
        hit = torch.zeros_like(out, dtype=torch.bool)
        hit[:, :2, :, 5] = masks(case)[..., key].expand(2, 2, -1)
        assert torch.equal(out[~hit], clean[~hit]), key
        assert torch.equal(out[hit].isnan(), torch.full_like(out[hit], value).isnan()), key
        assert not out[hit].isfinite().any(), key
        assert aux is not None
        assert torch.equal(aux.lse, clean_aux.lse), key
        assert torch.equal(aux.importance, clean_aux.importance), key


# Quiet, signalling and negative ones, with payloads: what other hardware makes.
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, 0x7F800001, -1, -0x3FFFFF])
def test_a_nan_of_any_bits_is_one(isa: str, bits: int) -> None:
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    (q, k, v), options = Case(queries=20, keys=20).make()
    k[:, :, 7] = nan
    out, aux = split(sink_attention(q, k, v, **options))
    assert aux is not None
    assert out[:, :, 7:].isnan().all()
    assert aux.lse[:, :, 7:].isnan().all()
    assert out[:, :, :7].isfinite().all()
    assert aux.importance.isnan().all()
    (q, k, v), options = Case(kind="gated by element", queries=20, keys=20).make()
    options["gate"][:, :, 3, 5] = nan
    out, _ = split(sink_attention(q, k, v, **options))
    assert out[:, :, 3, 5].isnan().all()


@pytest.mark.parametrize("kind", ["gated", "gated by element"])
def test_a_spoilt_gate_of_a_row_without_a_key_leaves_it_zero(isa: str, kind: str) -> None:
    (q, k, v), options = Case(kind=kind, queries=20, keys=20).make()
    options["key_start"] = torch.tensor([6, 6])
    options["gate"][:, :, :6] = math.nan
    out, aux = split(sink_attention(q, k, v, **options))
    assert not out[:, :, :6].any()
    assert out.isfinite().all()
    assert aux is not None
    assert aux.importance.isfinite().all()


def test_a_key_far_below_the_others_has_no_weight_at_all(isa: str) -> None:
    q = torch.zeros(1, 1, 2, 32)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, 2, 32)
    k[0, 0, :, 0] = torch.tensor([-1000.0, 1000.0])
    v = torch.zeros(1, 1, 2, 32)
    v[0, 0, 0], v[0, 0, 1] = 1e38, 0.1
    out = sink_attention(q, k, v, kind="vanilla", scale=1.0)
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 1])
    for sink in (1000.0, math.inf):
        out, aux = split(sink_attention(q, k, v, sinks=torch.tensor([sink]), return_aux=True))
        assert not out.any()
        assert aux is not None
        assert aux.importance.item() == 0.0


@pytest.mark.parametrize("byte", [1, 2, 254, 255])
def test_a_mask_counts_by_what_is_true_and_not_by_its_byte(byte: int) -> None:
    (q, k, v), options = Case(some_tokens=True).make()
    _, want = split(sink_attention(q, k, v, **options))
    options["token_mask"] = (options["token_mask"].to(torch.uint8) * byte).view(torch.bool)
    _, aux = split(sink_attention(q, k, v, **options))
    assert aux is not None
    assert want is not None
    assert torch.equal(aux.importance, want.importance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", SPOILT, ids=str)
def test_a_nan_key_reaches_only_the_rows_that_see_it(
    isa: str, dtype: torch.dtype, mask: dict[str, object]
) -> None:
    shape = {"queries": 61, "keys": 61, "ratio": 2} | mask
    case = Case(dtype=dtype, **shape)  # type: ignore[arg-type]
    (q, k, v), options = case.make()
    clean, clean_aux = split(sink_attention(q, k, v, **options))
    assert clean_aux is not None
    for key in (0, 13, 31, case.keys - 1):
        spoilt = k.clone()
        spoilt[:, 0, key, 5] = math.nan
        out, aux = split(sink_attention(q, spoilt, v, **options))
        hit = torch.zeros(out.shape[:3], dtype=torch.bool)
        hit[:, :2] = masks(case)[..., key].expand(2, 2, -1)
        assert torch.equal(out[~hit], clean[~hit]), key
        assert out[hit].isnan().all(), key
        assert aux is not None
        assert torch.equal(aux.lse[~hit], clean_aux.lse[~hit]), key
        assert aux.lse[hit].isnan().all(), key
        assert torch.equal(aux.importance[2:], clean_aux.importance[2:]), key
        assert aux.importance[:2].isnan().tolist() == [hit.any().item()] * 2, key


@pytest.mark.parametrize("value", [math.nan, math.inf, NEVER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_spoilt_query_reaches_its_own_row_alone(
    isa: str, dtype: torch.dtype, value: float
) -> None:
    (q, k, v), options = Case(dtype=dtype, ratio=2, queries=45, keys=45).make()
    clean, _ = split(sink_attention(q, k, v, **options))
    spoilt = q.clone()
    spoilt[1, 2, 20, 3] = value
    out, aux = split(sink_attention(spoilt, k, v, **options))
    hit = torch.zeros(out.shape[:3], dtype=torch.bool)
    hit[1, 2, 20] = True
    assert torch.equal(out[~hit], clean[~hit])
    assert out[hit].isnan().all()
    assert aux is not None
    assert aux.importance.isnan().tolist() == [False, False, True, False]


def test_a_key_of_infinite_logit_is_nan_as_in_torch_and_of_minus_infinity_unseen(isa: str) -> None:
    q = torch.randn(1, 1, 30, 16).abs()
    k, v = torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 16)
    k[:, :, 4, 2] = math.inf
    k[:, :, 11, 3] = NEVER
    sinks = torch.zeros(1)
    out = sink_attention(q, k, v, sinks=sinks)
    assert out[:, :, 4:].isnan().all()
    assert out[:, :, :4].isfinite().all()
    without = k.clone()
    without[:, :, 4, 2] = NEVER
    check_call(q, without, v, sinks=sinks, return_aux=True)


@pytest.mark.parametrize("kind", ["sink", "vanilla", "gated"])
def test_uncounted_tokens_do_not_spoil_the_importance(isa: str, kind: str) -> None:
    (q, k, v), options = Case(kind=kind, queries=30, keys=30).make()
    token = torch.arange(30).expand(2, 30) != 12
    options["token_mask"] = token
    _, clean = split(sink_attention(q, k, v, **options))
    q[:, :, 12] = math.nan
    if kind == "gated":
        options["gate"][:, :, 12] = math.nan
    _, aux = split(sink_attention(q, k, v, **options))
    assert clean is not None
    assert aux is not None
    assert torch.equal(aux.importance, clean.importance)


def test_the_unused_end_of_a_cache_may_hold_anything(isa: str) -> None:
    (q, k, v), options = Case(queries=1, keys=90, causal=False).make()
    options["key_lengths"] = torch.tensor([33, 71])
    options["key_start"] = torch.tensor([2, 0])
    want, _ = split(sink_attention(q, k, v, **options))
    for x in (k, v):
        x[0, :, 33:] = math.nan
        x[0, :, :2] = math.inf
        x[1, :, 71:] = NEVER
    out, _ = check_call(q, k, v, **options)
    assert torch.equal(out, want)
