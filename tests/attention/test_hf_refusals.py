"""What attn_implementation="quernstone" does not do, it says by name."""

from typing import Any

import pytest
import torch
from torch import nn

from quernstone.attention.hf import attention_forward
from tests.attention.hf_tiny import (
    VOCABULARY,
    one_thread,  # noqa: F401  (a fixture)
    randomised,
    run,
    tiny,
    tokens,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

_DOES_NOT = 'attn_implementation="quernstone" does not support '


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"dropout": 0.1}, r"dropout \(got 0.1\)"),
        ({"softcap": 30.0}, "soft-capping"),
        ({"position_bias": torch.zeros(1, 4, 8, 8)}, "a position bias"),
        ({"attention_bias": torch.zeros(1, 4, 8, 8)}, "an attention bias"),
        ({"score_mod": lambda score, *_: score}, "a score function"),
        ({"head_mask": torch.ones(4)}, "a head mask"),
        ({"output_attentions": True}, "returning attention weights"),
        ({"sinks": torch.zeros(2, 4, 8, 1)}, "sink logits per token"),
        ({"indices": torch.zeros(2, 8, 4)}, "sparse attention"),
        ({"cache": object()}, "a paged cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, "packed sequences"),
        ({"s_aux": torch.zeros(4), "gate": torch.zeros(2, 4, 8)}, "sinks and a gate in one layer"),
        ({"attention_mask": torch.zeros(2, 1, 8, 8)}, "a dense attention_mask"),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.bool)}, "a dense attention_mask"),
    ],
)
def test_names_the_argument_that_it_has_no_meaning_for(argument: dict[str, Any], says: str) -> None:
    x = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match=_DOES_NOT + says):
        attention_forward(nn.Identity(), x, x, x, **{"attention_mask": None} | argument)


def test_ignores_what_says_nothing_about_the_scores() -> None:
    x = torch.randn(2, 4, 8, 16)
    plain, _ = attention_forward(nn.Identity(), x, x, x, None)
    more = {"softcap": None, "output_attentions": False, "position_ids": torch.arange(8)}
    assert torch.equal(attention_forward(nn.Identity(), x, x, x, None, **more)[0], plain)


def test_refuses_causality_that_could_be_lined_up_with_either_end() -> None:
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="causal attention of 3 queries to 8 keys without"):
        attention_forward(nn.Identity(), q, k, k, None)
    attention_forward(nn.Identity(), q[:, :, :1], k, k, None)
    attention_forward(nn.Identity(), q, k, k, None, is_causal=False)


def test_refuses_a_mask_for_other_keys_than_the_layer_has() -> None:
    from quernstone.attention.hf_mask import KeyMask

    x = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match="a mask for 2 x 8 queries and 9 keys"):
        attention_forward(nn.Identity(), x, x, x, KeyMask(2, 8, 9, 9, causal=True))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_in_training_says_dropout(name: str) -> None:
    rate = "attention_dropout" if name == "llama" else "attention_probs_dropout_prob"
    model = tiny(name, **{rate: 0.5}).train()
    with pytest.raises(ValueError, match=_DOES_NOT + "dropout"):
        run(model, "quernstone", input_ids=tokens())


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert"])
def test_a_model_asked_for_attention_weights_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        run(tiny(name), "quernstone", input_ids=tokens(), output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_padding_mask_with_holes_is_named(name: str) -> None:
    mask = torch.ones(3, 23, dtype=torch.int64)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="attention_mask: got a row in which a masked key"):
        run(tiny(name), "quernstone", input_ids=tokens(), attention_mask=mask)


def test_packed_sequences_are_named() -> None:
    positions = torch.cat([torch.arange(11), torch.arange(12)]).expand(3, -1)
    with pytest.raises(ValueError, match="position_ids: got packed sequences"):
        run(
            tiny("llama"),
            "quernstone",
            input_ids=tokens(),
            position_ids=positions,
            # With a cache transformers takes them for one sequence, and eager does the same.
            use_cache=False,
        )


def test_models_with_capped_scores_or_a_position_bias_are_named() -> None:
    import transformers as hf

    sizes = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **sizes, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16
        )
    )
    with pytest.raises(ValueError, match=_DOES_NOT + "soft-capping"):
        run(randomised(gemma), "quernstone", input_ids=tokens())
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    )
    with pytest.raises(ValueError, match=_DOES_NOT + "a position bias"):
        run(randomised(t5), "quernstone", input_ids=tokens(), decoder_input_ids=tokens())


def test_a_model_that_attends_by_itself_is_named() -> None:
    import transformers as hf

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    config = hf.CodeGenConfig(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    model = hf.CodeGenForCausalLM._from_config(config, attn_implementation="quernstone")
    with pytest.raises(ValueError, match="applies its mask outside the attention interface"):
        randomised(model)(tokens())
