"""The promises about error: 5e-7 in fp32, and never more than torch's own kernels make."""

import pytest
import torch

from quernstone.attention import reference, sink_attention

from . import oracles, tolerances
from .cases import Case, split

NEVER = float("-inf")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("keys", [512, 2048])
def test_fp32_error_on_normal_inputs_is_at_most_5e_7(
    isa: str, causal: bool, width: int, keys: int
) -> None:
    case = Case(batch=1, key_heads=1, queries=keys // 2, keys=keys, width=width, causal=causal)
    tensors, options = case.make()
    want, _ = split(reference.sink_attention(*tensors, **options))
    out, _ = split(sink_attention(*tensors, **options))
    assert tolerances.relative_error(out, want) <= 5e-7


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("sd", [1.0, 2.0, 5.0, 10.0, 20.0])
def test_fp32_error_is_never_above_that_of_torch_flash(
    isa: str, causal: bool, width: int, sd: float
) -> None:
    shape = {"batch": 1, "key_heads": 4, "queries": 512, "keys": 512, "width": width}
    (q, k, v), _ = Case(**shape, sd=sd).make()
    want, _ = split(reference.sink_attention(q, k, v, kind="vanilla", causal=causal))
    theirs, _ = oracles.torch_flash(q, k, v, causal=causal)
    ours = sink_attention(q, k, v, sinks=torch.full((4,), NEVER), causal=causal)
    allowed = tolerances.FP32_OVER_RIVAL * tolerances.relative_error(theirs, want)
    assert tolerances.relative_error(ours, want) <= allowed


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("sd", [1.0, 5.0, 20.0])
def test_bf16_error_is_no_worse_than_that_of_torch(
    isa: str, causal: bool, width: int, sd: float
) -> None:
    shape = {"batch": 1, "key_heads": 4, "queries": 512, "keys": 512, "width": width}
    (q, k, v), _ = Case(**shape, dtype=torch.bfloat16, sd=sd).make()
    want, _ = split(reference.sink_attention(q, k, v, kind="vanilla", causal=causal))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    ours = sink_attention(q, k, v, sinks=torch.full((4,), NEVER), causal=causal)
    allowed = tolerances.BF16_OVER_RIVAL * tolerances.relative_error(theirs, want)
    assert tolerances.relative_error(ours, want) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_with_sinks_is_no_worse_than_that_of_torch_with_an_extra_key(
    isa: str, dtype: torch.dtype
) -> None:
    shape = {"batch": 1, "key_heads": 4, "queries": 300, "keys": 300, "width": 64}
    (q, k, v), options = Case(**shape, dtype=dtype, aux=False).make()
    want, _ = split(reference.sink_attention(q, k, v, **options))
    seen = reference.visible(300, 300)
    theirs = oracles.torch_sdpa(q, k, v, seen, options["sinks"])
    ours, _ = split(sink_attention(q, k, v, **options))
    rival = tolerances.BF16_OVER_RIVAL if dtype is torch.bfloat16 else tolerances.FP32_OVER_RIVAL
    allowed = rival * tolerances.relative_error(theirs, want)
    assert tolerances.relative_error(ours, want) <= allowed


def test_the_log_sum_exp_of_one_key_is_its_logit(isa: str) -> None:
    # One channel, so that no sum is rounded. What is left: scale, q, product, and twice the base.
    q, k, sinks = torch.zeros(1, 1, 400, 32), torch.zeros(1, 1, 400, 32), torch.zeros(1)
    q[..., 7] = 8 * torch.randn(400)
    k[..., 7] = torch.randn(400)
    _, aux = split(sink_attention(q, k, k, sinks=sinks, window=1, scale=0.7, return_aux=True))
    want = 0.7 * q[..., 7].double() * k[..., 7].double()
    assert aux is not None
    allowed = 5 * tolerances.U_FP32 * want.abs()
    assert ((aux.lse.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("width", [31, 64, 65])
def test_bf16_is_rounded_to_nearest_in_every_channel(isa: str, width: int) -> None:
    shape = {"batch": 4, "key_heads": 4, "queries": 64, "keys": 64, "width": width}
    tensors, options = Case(**shape, dtype=torch.bfloat16, aux=False).make()
    want, _ = split(reference.sink_attention(*tensors, **options))
    out, _ = split(sink_attention(*tensors, **options))
    # Truncation would be off by u on average, to nearest 1024 rows leave a few hundredths of u.
    bias = ((out.double() - want) / want).clamp(-0.02, 0.02).mean(dim=(0, 1, 2))
    assert (bias.abs() < 0.3 * tolerances.U_BF16).all()
