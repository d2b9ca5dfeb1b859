"""Agreement with implementations that we did not write, at every instruction set."""

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from quernstone.attention import sink_attention

from . import oracles, tolerances
from .cases import split

NEVER = float("-inf")


def draw(
    heads: int, key_heads: int, queries: int, keys: int, width: int, batch: int = 2
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch, heads, queries, width),
        torch.randn(batch, key_heads, keys, width),
        torch.randn(batch, key_heads, keys, width),
        torch.randn(heads),
    )


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Both are in error by at most the promise."""
    allowed = 2 * tolerances.output(ours.dtype)
    assert tolerances.relative_error(ours, theirs) <= allowed


@pytest.mark.parametrize(
    ("heads", "key_heads", "queries", "keys", "width", "window"),
    [
        (4, 4, 65, 65, 64, None),
        (8, 2, 130, 130, 64, 32),
        (4, 1, 97, 97, 128, None),
        (3, 3, 40, 71, 80, None),
        (4, 2, 1, 200, 64, 128),
        (4, 2, 33, 96, 128, 17),
    ],
)
def test_equals_the_eager_attention_of_gpt_oss(
    isa: str, heads: int, key_heads: int, queries: int, keys: int, width: int, window: int | None
) -> None:
    q, k, v, sinks = draw(heads, key_heads, queries, keys, width)
    start = torch.tensor([0, keys // 3])
    attended = torch.arange(keys) >= start[:, None]
    theirs = oracles.gpt_oss_eager(q, k, v, sinks, window=window, attended=attended)
    assert_agrees(sink_attention(q, k, v, sinks=sinks, window=window, key_start=start), theirs)


@pytest.mark.parametrize(
    ("heads", "key_heads", "length", "width", "window"),
    [(8, 2, 128, 64, None), (4, 4, 77, 128, None), (4, 2, 96, 80, None), (4, 1, 128, 64, 20)],
)
def test_equals_group_query_attention_of_onnx_runtime(
    isa: str, heads: int, key_heads: int, length: int, width: int, window: int | None
) -> None:
    q, k, v, sinks = draw(heads, key_heads, length, length, width)
    lengths = [length, length // 2]
    theirs = oracles.onnx_runtime(q, k, v, sinks, lengths=lengths, window=window or -1)
    ours = sink_attention(
        q, k, v, sinks=sinks, window=window, key_lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    # Past the end of a sequence ONNX Runtime leaves what it likes.
    for sequence, end in enumerate(lengths):
        assert_agrees(ours[sequence, :, :end], theirs[sequence, :, :end])


@pytest.mark.parametrize(
    ("heads", "key_heads", "queries", "keys", "width"),
    [(4, 2, 100, 100, 64), (2, 2, 17, 129, 128), (6, 2, 64, 95, 80), (4, 1, 1, 65, 256)],
)
def test_equals_torch_with_a_key_that_has_no_value(
    isa: str, heads: int, key_heads: int, queries: int, keys: int, width: int
) -> None:
    q, k, v, sinks = draw(heads, key_heads, queries, keys, width)
    start, end = torch.tensor([0, 5]), torch.tensor([keys - 7, keys])
    key = torch.arange(keys)
    seen = (key >= start[:, None]) & (key < end[:, None])
    theirs = oracles.torch_sdpa(q, k, v, seen[:, None, None], sinks)
    ours = sink_attention(q, k, v, sinks=sinks, causal=False, key_start=start, key_lengths=end)
    assert_agrees(ours, theirs)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 77), (31, 96), (96, 130)])
@pytest.mark.parametrize("width", [48, 64, 128])
def test_without_a_sink_equals_torch_aligned_to_the_end(
    isa: str, queries: int, keys: int, width: int
) -> None:
    q, k, v, sinks = draw(4, 2, queries, keys, width)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_lower_right(queries, keys), enable_gqa=True
    )
    assert_agrees(sink_attention(q, k, v, sinks=sinks.fill_(NEVER)), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_equals_torch_times_the_sigmoid(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in draw(4, 2, 50, 50, 64)[:3])
    gate = torch.randn_like(q)
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    theirs = oracles.torch_sdpa(q.float(), k.float(), v.float(), seen) * gate.float().sigmoid()
    assert_agrees(sink_attention(q, k, v, kind="gated", gate=gate), theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_log_sum_exp_equals_that_of_torch_flash(isa: str, causal: bool, width: int) -> None:
    q, k, v, sinks = draw(4, 2, 160, 160, width)
    _, theirs = oracles.torch_flash(q, k, v, causal=causal)
    _, aux = split(sink_attention(q, k, v, sinks=sinks, causal=causal, return_aux=True))
    assert aux is not None
    torch.testing.assert_close(aux.lse, theirs, rtol=0.0, atol=2 * tolerances.lse(theirs, width))
