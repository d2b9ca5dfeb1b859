"""How many tokens an importance is a mean over."""

import pytest
import torch

from quernstone.attention import reference
from quernstone.attention.hf_mask import KeyMask
from quernstone.attention.token_count import counted_tokens, token_mask

from .cases import KINDS, PADDINGS, Case

CPU = torch.device("cpu")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_what_the_mask_of_the_reference_shows(
    kind: str, causal: bool, window: int | None, padding: str
) -> None:
    for queries, keys in ((9, 9), (1, 9), (5, 12), (12, 5)):
        for some in (False, True):
            case = Case(
                kind=kind,
                causal=causal,
                window=window,
                padding=padding,
                queries=queries,
                keys=keys,
                batch=6,
                some_tokens=some,
            )
            (q, k, _), options = case.make()
            masks = {x: options.get(x) for x in ("causal", "window", "key_start", "key_lengths")}
            seen = reference.visible(queries, keys, **masks).expand(6, 1, queries, keys).clone()
            if kind == "vanilla":
                start = options.get("key_start", torch.zeros(6, dtype=torch.int64))
                seen &= torch.arange(keys) != start.view(-1, 1, 1, 1)
            want = seen.any(-1)[:, 0]
            if some:
                want &= options["token_mask"]
            got = counted_tokens(
                len(q),
                queries,
                k.shape[2],
                kind=options["kind"],
                token_mask=options.get("token_mask"),
                **masks,
            )
            assert got == want.sum(), case


def mask_of(**changes: object) -> KeyMask:
    given: dict[str, object] = {"batch": 2, "queries": 5, "keys": 5, "used": 5, "causal": True}
    return KeyMask(**given | changes)  # type: ignore[arg-type]


def test_padding_does_not_count_unless_asked() -> None:
    mask = mask_of(key_start=torch.tensor([2, 0]), key_lengths=torch.tensor([5, 4]))
    got = token_mask(mask, device=CPU)
    assert got is not None
    assert got.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert token_mask(mask, count_padding=True, device=CPU) is None
    assert token_mask(mask_of(), device=CPU) is None


def test_the_first_tokens_are_those_after_the_padding() -> None:
    mask = mask_of(key_start=torch.tensor([2, 0]), key_lengths=torch.tensor([5, 4]))
    got = token_mask(mask, skip_first=2, device=CPU)
    assert got is not None
    assert got.int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
    counted = token_mask(mask, skip_first=2, count_padding=True, device=CPU)
    assert counted is not None
    assert counted.int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    plain = token_mask(mask_of(), skip_first=1, device=CPU)
    assert plain is not None
    assert plain.int().tolist() == [[0, 1, 1, 1, 1]] * 2


def test_the_padding_of_an_encoder_says_nothing_about_the_decoder_that_reads_it() -> None:
    lengths = torch.tensor([1, 9])
    mask = mask_of(keys=9, used=9, causal=False, key_start=0 * lengths, key_lengths=lengths)
    assert token_mask(mask, device=CPU) is None
