"""The decode step on a real GPU, against the reference: `make gpu`.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import cuda_decode, reference

from . import tolerances
from .cases import KINDS, PADDINGS, Case, split

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}


def check(case: Case) -> None:
    (q, k, v), options = case.make()
    want, aux = split(reference.sink_attention(q, k, v, **options))
    assert aux is not None
    del options["return_aux"]
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    assert cuda_decode.supports(q, k)
    out, lse, importance = cuda_decode.decode(q, k, v, **on_gpu(options), aux=True)
    assert lse is not None
    assert importance is not None

    label = str(case)
    error = tolerances.relative_error(out.cpu(), want)
    assert error <= tolerances.output(q.dtype, case.logit_sd), f"{label}: off by {error:.2e}"
    blind = aux.lse == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), blind), label
    off = (lse.cpu().double() - aux.lse)[~blind].abs()
    assert not (off > tolerances.lse(aux.lse, case.width)).any(), f"{label}: lse off by {off.max()}"
    largest = aux.lse[~blind].abs().max().item() if not blind.all() else 0.0
    if "sinks" in options:
        largest = max(largest, options["sinks"].abs().max().item())
    off = (importance.cpu().double() - aux.importance).abs()
    allowed = tolerances.gate(largest, case.width) * aux.importance + tolerances.UNDERFLOW
    assert (off <= allowed).all(), f"{label}: importance off by {off}"

    again = cuda_decode.decode(q, k, v, **on_gpu(options), aux=True)
    for got, same in zip((out, lse, importance), again, strict=True):
        assert same is not None
        assert torch.equal(got, same), f"{label}: other bits in the second run"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_mask(kind: str, causal: bool, window: int | None, padding: str) -> None:
    mask = {"causal": causal, "window": window, "padding": padding}
    check(Case(kind=kind, ratio=3, queries=4, keys=1500, some_tokens=True, **mask))


@pytest.mark.parametrize("width", [16, 33, 64, 65, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_width(dtype: torch.dtype, width: int) -> None:
    for kind in KINDS:
        check(Case(kind=kind, dtype=dtype, width=width, ratio=4, queries=2, keys=700))


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("ratio", [1, 3, 8, 64])
def test_any_number_of_queries_and_heads_of_a_group(ratio: int, queries: int) -> None:
    check(Case(ratio=ratio, queries=queries, keys=2000, width=128, dtype=torch.bfloat16))


def test_a_long_cache() -> None:
    check(Case(ratio=8, key_heads=2, batch=1, queries=1, keys=131072, width=128))


def test_runs_on_the_current_stream() -> None:
    (q, k, v), options = Case(queries=1, keys=4000, aux=False).make()
    del options["return_aux"]
    q, k, v, options = q.cuda(), k.cuda(), v.cuda(), on_gpu(options)
    want, _, _ = cuda_decode.decode(q, k, v, **options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late = q + 0.0
        got, _, _ = cuda_decode.decode(late, k, v, **options)
    stream.synchronize()
    assert torch.equal(got, want)
