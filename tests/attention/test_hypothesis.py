"""Whatever the shapes, masks, kinds and layouts: the reference's result, finite and repeatable."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import DTYPES, KINDS, Case, check_call

LENGTHS = st.one_of(st.integers(0, 40), st.integers(0, 230))

CASES = st.builds(
    Case,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 3),
    key_heads=st.integers(1, 3),
    ratio=st.integers(1, 5),
    queries=LENGTHS,
    keys=LENGTHS,
    width=st.integers(16, 256),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 250),
    scale=st.none() | st.floats(-0.2, 0.2),
    some_tokens=st.booleans(),
    aux=st.booleans(),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    """A case with key ranges of its own for each sequence, empty and reversed ones too."""
    case = draw(CASES)
    bounds = st.lists(st.integers(0, case.keys), min_size=case.batch, max_size=case.batch).map(
        lambda x: torch.tensor(x, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    )
    ranges = {name: draw(bounds) for name in ("key_start", "key_lengths") if draw(st.booleans())}
    return case, ranges


@settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=calls(), seed=st.integers(0, 99))
def test_any_call_gives_the_result_of_the_reference(
    isa: str, call: tuple[Case, dict[str, Any]], seed: int
) -> None:
    case, ranges = call
    (q, k, v), options = case.make(seed)
    out, aux = check_call(q, k, v, logit_sd=case.logit_sd, label=str(case), **(options | ranges))
    assert out.isfinite().all()
    if aux is not None:
        assert not aux.lse.isnan().any()
        assert ((aux.importance >= 0) & (aux.importance <= 1 + 1e-6)).all()
