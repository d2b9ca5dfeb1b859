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
