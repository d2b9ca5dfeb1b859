"""Models of transformers with attn_implementation="quernstone" against the same with "eager"."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernstone.attention import reference
from quernstone.attention.hf import attention_forward
from tests.attention.hf_tiny import (
    CAUSAL,
    VOCABULARY,
    WINDOW,
    assert_close,
    one_thread,  # noqa: F401  (a fixture)
    padding,
    randomised,
    run,
    tiny,
    tokens,
)

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIDES = (None, "left", "right")
_BOTH = ("quernstone", "eager")


def test_transformers_is_not_imported_with_the_package() -> None:
    code = "import sys, quernstone.attention; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_logits_equal_eager(name: str, side: str | None) -> None:
    model, ids, mask = tiny(name), tokens(), padding(side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_close(run(model, "quernstone", **inputs), run(model, "eager", **inputs), mask)


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_padding_is_never_attended(name: str) -> None:
    model, ids, mask = tiny(name), tokens(), padding("left")
    assert mask is not None
    other = ids.where(mask.bool(), (ids + 1) % VOCABULARY)
    one, two = (
        run(model, "quernstone", input_ids=x, attention_mask=mask)[mask.bool()]
        for x in (ids, other)
    )
    assert_close(one, two)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generates_the_text_of_eager(name: str, cache: str, side: str | None) -> None:
    model, ids, mask = tiny(name), tokens(), padding(side)
    got, want = (_generated(model, implementation, ids, mask, cache) for implementation in _BOTH)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits))


def _generated(
    model: Any, implementation: str, ids: Tensor, mask: Tensor | None, cache: str
) -> Any:
    model.set_attn_implementation(implementation)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        # Beyond the window, so that a sliding cache turns over.
        max_new_tokens=WINDOW + 2,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation="static" if cache == "static" else None,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_pieces_through_a_cache_equal_eager(name: str, side: str | None) -> None:
    model, ids, mask = tiny(name), tokens(), padding(side)
    got, want = (_in_pieces(model, implementation, ids, mask) for implementation in _BOTH)
    assert_close(got, want, mask)


def _in_pieces(model: Any, implementation: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    model.set_attn_implementation(implementation)
    cache, pieces = None, []
    # A chunk after a chunk is what a cache and a window have to be lined up for.
    for start, end in ((0, 9), (9, 17), (17, 18), (18, 23)):
        with torch.no_grad():
            output = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def test_cross_attention_equals_eager() -> None:
    import transformers as hf

    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in _LAYERS.items()}
    config = hf.BartConfig(vocab_size=VOCABULARY, d_model=64, max_position_embeddings=64, **sizes)
    model = randomised(hf.BartForConditionalGeneration(config))
    mask = padding("right")
    inputs = {
        "input_ids": tokens(),
        "attention_mask": mask,
        "decoder_input_ids": tokens(11),
        "use_cache": False,
    }
    assert_close(run(model, "quernstone", **inputs), run(model, "eager", **inputs))


_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


def test_bidirectional_window_equals_eager() -> None:
    import transformers as hf

    config = hf.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=2 * WINDOW,
        pad_token_id=0,
    )
    model = randomised(hf.ModernBertModel(config))
    mask = padding("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    assert_close(run(model, "quernstone", **inputs), run(model, "eager", **inputs), mask)


@pytest.mark.parametrize("by", ["config", "argument"])
def test_a_decoder_made_bidirectional_equals_eager(by: str) -> None:
    model, mask = tiny("llama"), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    causal = run(model, "quernstone", **inputs)
    if by == "config":
        model.config.is_causal = False
    else:
        inputs["is_causal"] = False
    got = run(model, "quernstone", **inputs)
    assert_close(got, run(model, "eager", **inputs), mask)
    assert (got - causal).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert"])
def test_bf16_strays_no_further_than_eager(name: str) -> None:
    model, inputs = tiny(name), {"input_ids": tokens()}
    exact = run(model, "eager", **inputs)
    model = model.to(torch.bfloat16)
    ours, eager = (
        (run(model, implementation, **inputs).float() - exact).norm() / exact.norm()
        for implementation in _BOTH
    )
    # Either error is mostly that of the layers around the attention, which round alike.
    assert ours <= 1.25 * eager


class _Layer(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def _qkv(queries: int = 9, keys: int = 9, value_width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, queries, 32),
        torch.randn(2, 2, keys, 32),
        torch.randn(2, 2, keys, value_width),
    )


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("layer_is_causal", [False, True])
def test_without_a_mask_the_argument_goes_before_the_layer(
    layer_is_causal: bool, is_causal: bool | None
) -> None:
    q, k, v = _qkv()
    causal = layer_is_causal if is_causal is None else is_causal
    got, weights = attention_forward(_Layer(layer_is_causal), q, k, v, None, is_causal=is_causal)
    want = reference.sink_attention(q, k, v, kind="vanilla", causal=causal)
    torch.testing.assert_close(got.transpose(1, 2).double(), want, rtol=1e-5, atol=1e-5)
    assert weights is None
    assert got.is_contiguous()


@pytest.mark.parametrize("value_width", [16, 48])
def test_a_value_may_have_a_width_of_its_own(value_width: int) -> None:
    q, k, v = _qkv(value_width=value_width)
    got, _ = attention_forward(_Layer(True), q, k, v, None)
    groups = 2
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    want = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-5, atol=1e-5)


def test_registering_twice_changes_nothing() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from quernstone.attention import register_with_transformers

    register_with_transformers()
    register_with_transformers()
    assert AttentionInterface()["quernstone"] is attention_forward
    assert "quernstone" in AttentionMaskInterface().valid_keys()
