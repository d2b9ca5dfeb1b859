"""Equality with the fp64 reference, over shapes around vector widths and blocks, and all flags."""

import pytest
import torch

from .cases import DTYPES, KINDS, Case, check, check_call, run
from .sweep import every_flag, every_pair

PAIRS = every_pair()


@pytest.mark.parametrize("part", range(8))
def test_any_two_values_of_any_two_parameters_meet(isa: str, part: int) -> None:
    for case in PAIRS[part::8]:
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_of_masks(isa: str, kind: str, dtype: torch.dtype) -> None:
    for case in every_flag(kind, dtype):
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 128])
def test_long_sequences(isa: str, kind: str, dtype: torch.dtype, width: int) -> None:
    shape = {"batch": 1, "queries": 611, "keys": 1201, "width": width, "ratio": 2}
    check(Case(kind=kind, dtype=dtype, **shape))
    check(Case(kind=kind, dtype=dtype, window=128, padding="start", **shape))
    check(Case(kind=kind, dtype=dtype, causal=False, padding="lengths", **shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_query_over_a_long_cache(isa: str, kind: str, dtype: torch.dtype) -> None:
    for ratio in (1, 4, 7):
        check(Case(kind=kind, dtype=dtype, ratio=ratio, queries=1, keys=2053, width=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"keys": 0, "queries": 0}], ids=str
)
def test_empty_axes_give_empty_results_or_rows_without_a_key(
    isa: str, kind: str, dtype: torch.dtype, shape: dict[str, int]
) -> None:
    for padding in ("none", "both"):
        for causal in (True, False):
            case = Case(kind=kind, dtype=dtype, causal=causal, padding=padding, ratio=2, **shape)
            out, aux = check(case)
            assert not out.any()
            assert aux is not None
            assert not aux.importance.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_may_be_fp32_beside_bf16_keys(isa: str, dtype: torch.dtype) -> None:
    (q, k, v), options = Case(dtype=torch.bfloat16).make()
    check_call(q, k, v, **(options | {"sinks": options["sinks"].to(dtype)}))


def test_the_number_of_threads_does_not_change_a_bit(isa: str) -> None:
    for case in PAIRS[::3]:
        torch.set_num_threads(1)
        out, aux = run(case)
        torch.set_num_threads(2)
        again, again_aux = run(case)
        assert torch.equal(again, out), case
        if aux is not None and again_aux is not None:
            assert torch.equal(again_aux.lse, aux.lse), case
            assert torch.equal(again_aux.importance, aux.importance), case


def test_two_calls_give_the_same_bits(isa: str) -> None:
    case = Case(batch=2, ratio=4, queries=300, keys=300, width=64)
    first, aux = run(case)
    for _ in range(5):
        out, again = run(case)
        assert torch.equal(out, first)
        assert aux is not None
        assert again is not None
        assert torch.equal(again.importance, aux.importance)
