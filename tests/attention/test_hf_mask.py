"""The range of keys that a mask becomes, against the mask tensor that transformers would make."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quernstone.attention import reference
from quernstone.attention.hf_mask import KeyMask, key_mask

pytest.importorskip("transformers")


def _dense(**arguments: Any) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    made: Tensor = sdpa_mask(**arguments, allow_is_causal_skip=False)
    return made


def _visible(mask: KeyMask) -> Tensor:
    """bool [b, 1, t, s] of what `sink_attention` is told, over all keys of the layer."""
    seen = torch.zeros(mask.shape, dtype=torch.bool)
    seen[..., : mask.used] = reference.visible(
        mask.queries,
        mask.used,
        causal=mask.causal,
        window=mask.window,
        key_start=mask.key_start,
        key_lengths=mask.key_lengths,
    )
    return seen


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    """A cache of any filling, length and offset, with padding on both sides."""
    from transformers import masking_utils as hf

    queries, past = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    dropped, unfilled = draw(st.integers(0, past)), draw(st.integers(0, 5))
    window = draw(st.integers(1, 12))
    function, bidirectional = draw(
        st.sampled_from(
            [
                (hf.causal_mask_function, False),
                (hf.sliding_window_causal_mask_function(window), False),
                (hf.bidirectional_mask_function, True),
            ]
        )
    )
    batch, total = draw(st.integers(1, 3)), past + queries
    mask = None
    if draw(st.booleans()):
        ends = st.tuples(st.integers(0, total), st.integers(0, total))
        ranges = [sorted(draw(ends)) for _ in range(batch)]
        key = torch.arange(total)
        mask = torch.stack([(key >= start) & (key < end) for start, end in ranges])
    return {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": total - dropped + (0 if bidirectional else unfilled),
        "q_offset": past,
        "kv_offset": dropped,
        "mask_function": function,
        "attention_mask": mask,
    }


@given(_cases())
def test_the_range_of_keys_is_the_mask_of_transformers(case: dict[str, Any]) -> None:
    assert torch.equal(_visible(key_mask(**case)), _dense(**case))


@given(length=st.integers(1, 9), window=st.integers(0, 9))
def test_so_is_the_bidirectional_window(length: int, window: int) -> None:
    from transformers.masking_utils import sliding_window_bidirectional_mask_function

    case = {
        "batch_size": 1,
        "q_length": length,
        "kv_length": length,
        "mask_function": sliding_window_bidirectional_mask_function(window),
    }
    assert torch.equal(_visible(key_mask(**case)), _dense(**case))


def test_chunks_are_right_while_the_sequences_fit_into_one() -> None:
    from transformers.masking_utils import chunked_causal_mask_function

    padding = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    case = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "mask_function": chunked_causal_mask_function(6, torch.tensor([0, 2])),
        "attention_mask": padding,
    }
    real = padding[:, None, :, None]
    assert torch.equal(_visible(key_mask(**case)) & real, _dense(**case) & real)
    with pytest.raises(ValueError, match="chunked attention over 6 keys, only up to 5"):
        key_mask(**case | {"mask_function": chunked_causal_mask_function(5, torch.tensor([0, 2]))})


def test_tokens_are_the_queries_that_are_no_padding() -> None:
    from transformers.masking_utils import causal_mask_function

    padding = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    mask = key_mask(2, 2, 5, 3, 0, causal_mask_function, padding)
    tokens = mask.tokens()
    assert tokens is not None
    assert torch.equal(tokens, padding[:, 3:])
    assert key_mask(2, 2, 5, 3, 0, causal_mask_function, None).tokens() is None


def test_a_mask_is_as_small_for_a_million_tokens() -> None:
    from transformers.masking_utils import causal_mask_function

    length = 1_000_000
    mask = key_mask(1, length, length, 0, 0, causal_mask_function, torch.ones(1, length) > 0)
    assert mask.shape == (1, 1, length, length)
    assert (mask.key_start, mask.key_lengths) == (None, None)


def _packed() -> Any:
    from transformers import masking_utils as hf

    return hf.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))


def _named(name: str, *arguments: Any) -> Any:
    from transformers import masking_utils as hf

    return getattr(hf, name)(*arguments)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_packed, "packed sequences"),
        (lambda: lambda b, h, q, k: q >= k, "mask functions of the user"),
        (lambda: _named("or_masks", _packed(), _packed()), "unions of masks"),
        (lambda: _named("blockwise_overlay", torch.zeros(1, 4)), "unions of masks"),
        (lambda: _named("sliding_window_overlay", 2), "window behind the query without causality"),
    ],
)
def test_names_the_pattern_that_is_no_range_of_keys(function: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        key_mask(1, 4, 4, 0, 0, function())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": torch.tensor([[True, False, True, True]])}, "between visible ones"),
        ({"attention_mask": torch.ones(1, 1, 4, dtype=torch.bool)}, r"of shape \(1, 1, 4\)"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, r"of shape \(2, 4\)"),
        ({"q_offset": 2}, "queries that end at key 6 of 4"),
    ],
)
def test_names_the_argument_that_does_not_fit(arguments: dict[str, Any], says: str) -> None:
    from transformers.masking_utils import causal_mask_function

    case = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": causal_mask_function}
    with pytest.raises(ValueError, match=says):
        key_mask(**case | arguments)


def test_a_mask_made_beforehand_is_used_where_it_fits() -> None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    made = key_mask(2, 3, 8, 2, 0, causal_mask_function, torch.ones(2, 5) > 0)
    assert key_mask(2, 3, 8, 2, 0, causal_mask_function, made) is made
    with pytest.raises(ValueError, match="a mask made for"):
        key_mask(2, 3, 8, 2, 0, bidirectional_mask_function, made)


def test_a_model_that_applies_its_mask_by_itself_fails_at_once() -> None:
    from transformers.masking_utils import causal_mask_function

    mask: Any = key_mask(1, 4, 4, 0, 0, causal_mask_function)
    for apply in (torch.add, torch.mul, torch.sub):
        with pytest.raises(ValueError, match="applies its mask outside the attention interface"):
            apply(torch.zeros(1, 1, 4, 4), mask)
    with pytest.raises(ValueError, match="applies its mask outside the attention interface"):
        torch.zeros(1, 1, 4, 4) + mask
