"""What must hold between two of our own results, whatever the inputs."""

import pytest
import torch
import torch.nn.functional as F

from quernstone.attention import Aux, sink_attention

from . import tolerances
from .cases import KINDS, Case, split

NEVER = float("-inf")


def gates(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance [h], and the gates [h, b t] that it averages, one call with one token each."""
    (q, k, v), options = case.make()
    b, _, t, _ = q.shape
    _, aux = split(sink_attention(q, k, v, **options))
    assert aux is not None
    single = []
    for token in range(b * t):
        mask = (torch.arange(b * t) == token).view(b, t)
        _, one = split(sink_attention(q, k, v, **(options | {"token_mask": mask})))
        assert one is not None
        single.append(one.importance)
    return aux.importance, torch.stack(single, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_of_minus_infinity_is_plain_attention(isa: str, dtype: torch.dtype) -> None:
    (q, k, v), _ = Case(dtype=dtype, ratio=2, queries=45, keys=70).make()
    plain = sink_attention(q, k, v, kind="vanilla")
    ours = sink_attention(q, k, v, sinks=torch.full((4,), NEVER))
    assert tolerances.relative_error(ours, plain) <= 2 * tolerances.output(dtype)


def test_a_sink_of_minus_infinity_has_importance_one(isa: str) -> None:
    (q, k, v), options = Case(queries=45, keys=45).make()
    _, aux = split(sink_attention(q, k, v, **(options | {"sinks": torch.full((2,), NEVER)})))
    assert aux is not None
    torch.testing.assert_close(
        aux.importance, torch.ones(2), rtol=tolerances.gate(0.0, 32), atol=0.0
    )


def test_a_sink_is_one_more_key_without_a_value(isa: str) -> None:
    (q, k, v), options = Case(queries=40, keys=63, width=64, causal=False).make()
    # The last channel carries the sink's logit: 1 in the queries, the logit in the extra key.
    q1 = F.pad(q * 64**-0.5, (0, 1), value=1.0)
    k1 = F.pad(F.pad(k, (0, 1)), (0, 0, 0, 1))
    k1[:, :, -1, -1] = options["sinks"]
    v1 = F.pad(v, (0, 1, 0, 1))
    whole, _ = split(sink_attention(q1, k1, v1, kind="vanilla", causal=False, scale=1.0))
    ours, _ = split(sink_attention(q, k, v, **options))
    allowed = 2 * tolerances.output(q.dtype)
    assert tolerances.relative_error(ours, whole[..., :-1]) <= allowed


@pytest.mark.parametrize("padding", ["none", "both"])
def test_the_vanilla_gate_is_one_minus_the_weight_of_the_first_key(isa: str, padding: str) -> None:
    case = Case(kind="vanilla", ratio=2, queries=9, keys=20, padding=padding)
    (q, k, _), options = case.make(seed=3)
    # Values that are 1 at the first key and 0 elsewhere give its weight as the output.
    start = options.get("key_start", torch.zeros(2, dtype=torch.int64))
    first = torch.arange(20) == start[:, None]
    v = first.float()[:, None, :, None].expand_as(k)
    weight, aux = split(sink_attention(q, k, v, **options))
    assert aux is not None
    length = options.get("key_lengths", torch.tensor([20, 20]))
    last = torch.minimum(length[:, None] - 1, torch.arange(9) + 11)
    counted = (last > start[:, None])[:, None].expand(2, 4, 9)
    want = [(1 - weight[:, h, :, 0])[counted[:, h]].mean() for h in range(4)]
    torch.testing.assert_close(aux.importance, torch.stack(want), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_mean_of_the_gates(isa: str, kind: str) -> None:
    importance, single = gates(Case(kind=kind, ratio=2, batch=2, queries=11, keys=23))
    torch.testing.assert_close(importance, single.mean(1), rtol=8 * tolerances.U_FP32, atol=0.0)


@pytest.mark.parametrize("kind", ["sink", "gated", "gated by element"])
def test_the_gate_is_the_gated_over_the_plain_output(isa: str, kind: str) -> None:
    (q, k, v), options = Case(kind=kind, ratio=2, queries=37, keys=37, aux=False).make()
    plain, aux = split(sink_attention(q, k, v, kind="vanilla", return_aux=True))
    assert aux is not None
    if kind == "sink":
        gate = (aux.lse - options["sinks"].view(-1, 1)).sigmoid()
    else:
        gate = options["gate"].sigmoid()
    gate = gate if gate.dim() == 4 else gate.unsqueeze(-1)
    ours, _ = split(sink_attention(q, k, v, **options))
    assert tolerances.relative_error(ours, gate * plain) <= tolerances.output(q.dtype)


@pytest.mark.parametrize("kind", ["sink", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_keys_does_not_matter_without_a_mask(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    case = Case(kind=kind, dtype=dtype, queries=30, keys=101, causal=False)
    (q, k, v), options = case.make()
    order = torch.randperm(101)
    straight, aux = split(sink_attention(q, k, v, **options))
    shuffled, shuffled_aux = split(sink_attention(q, k[:, :, order], v[:, :, order], **options))
    assert tolerances.relative_error(shuffled, straight) <= 2 * tolerances.output(dtype)
    assert isinstance(aux, Aux)
    assert isinstance(shuffled_aux, Aux)
    allowed = 2 * tolerances.lse(aux.lse, q.shape[3])
    torch.testing.assert_close(shuffled_aux.lse, aux.lse, rtol=0.0, atol=allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_gives_the_bits_of_the_prefill_rows(
    isa: str, kind: str, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(kind=kind, dtype=dtype, ratio=4, queries=75, keys=75, window=window)
    (q, k, v), options = case.make()
    prefill, aux = split(sink_attention(q, k, v, **options))
    assert aux is not None
    for t in (0, 1, 33, 74):
        step = dict(options)
        if "gate" in step:
            step["gate"] = step["gate"][:, :, t : t + 1]
        keys, values = k[:, :, : t + 1], v[:, :, : t + 1]
        row, row_aux = split(sink_attention(q[:, :, t : t + 1], keys, values, **step))
        assert row_aux is not None
        assert torch.equal(row, prefill[:, :, t : t + 1]), t
        assert torch.equal(row_aux.lse, aux.lse[:, :, t : t + 1]), t


def test_a_row_has_the_same_bits_in_a_call_of_any_length(isa: str) -> None:
    """Windows and lengths on both sides of every step that a block of keys is cut into."""
    for window in (None, 100, 200, 256, 300, 400):
        case = Case(batch=1, key_heads=1, queries=620, keys=620, width=16, aux=False)
        (q, k, v), options = case.make()
        options["window"] = window
        whole, _ = split(sink_attention(q, k, v, **options))
        for t in (1, 99, 143, 144, 150, 200, 255, 256, 287, 288, 300, 400, 433, 577, 619):
            row = sink_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], **options)
            assert torch.equal(row, whole[:, :, t : t + 1]), (window, t)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(50, 66), (66, 50)])
@pytest.mark.parametrize("window", [66, 2**31, 2**40, 2**63 - 1])
def test_a_window_as_long_as_the_keys_is_no_window(
    isa: str, causal: bool, queries: int, keys: int, window: int
) -> None:
    (q, k, v), options = Case(queries=queries, keys=keys, causal=causal, aux=False).make()
    whole, _ = split(sink_attention(q, k, v, **options))
    assert torch.equal(sink_attention(q, k, v, **(options | {"window": window})), whole)


def test_key_lengths_are_the_same_as_fewer_keys(isa: str) -> None:
    (q, k, v), options = Case(queries=20, keys=90, causal=False).make()
    short, aux = split(sink_attention(q, k[:, :, :61], v[:, :, :61], **options))
    lengths = torch.tensor([61, 61])
    cut, cut_aux = split(sink_attention(q, k, v, key_lengths=lengths, **options))
    assert torch.equal(cut, short)
    assert isinstance(aux, Aux)
    assert isinstance(cut_aux, Aux)
    assert torch.equal(cut_aux.lse, aux.lse)
    assert torch.equal(cut_aux.importance, aux.importance)


@pytest.mark.parametrize("kind", KINDS)
def test_aux_does_not_change_the_output(isa: str, kind: str) -> None:
    (q, k, v), options = Case(kind=kind, ratio=2, queries=50, keys=66, aux=False).make()
    bare, _ = split(sink_attention(q, k, v, **options))
    out, _ = split(sink_attention(q, k, v, **(options | {"return_aux": True})))
    if kind == "vanilla":  # its gate needs the sums without the first key, which then comes last
        assert tolerances.relative_error(out, bare) <= 2 * tolerances.output(q.dtype)
    else:
        assert torch.equal(out, bare)


def test_a_negative_scale_is_the_negated_keys(isa: str) -> None:
    (q, k, v), options = Case(queries=50, keys=66, scale=0.3).make()
    plus, _ = split(sink_attention(q, k, v, **options))
    minus, _ = split(sink_attention(q, -k, v, **(options | {"scale": -0.3})))
    assert tolerances.relative_error(minus, plus) <= 2 * tolerances.output(q.dtype)
