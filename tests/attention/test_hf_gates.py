"""Qwen3-Next with its output gate fused into the attention, against the gate outside it."""

import copy
from typing import Any

import pytest
import torch

from quernstone.attention import hf_gates, reference
from quernstone.attention.hf_gates import fuse_gates, unfuse_gates
from tests.attention.hf_tiny import (
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

LAYER = "model.layers.1.self_attn"


def _kinds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the calls of `sink_attention` that follow are: kind and shape of the gate."""
    import quernstone.attention.hf as adapter

    calls = []

    def spy(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        gate = options["gate"]
        calls.append((options["kind"], None if gate is None else tuple(gate.shape)))
        return reference.sink_attention(*tensors, **options).to(tensors[0].dtype)

    monkeypatch.setattr(adapter, "sink_attention", spy)
    return calls


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_equal_eager(side: str | None) -> None:
    model, mask = tiny("qwen3_next"), padding(side)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    want = run(model, "eager", **inputs)
    assert fuse_gates(model) == [LAYER]
    assert_close(run(model, "quernstone", **inputs), want, mask)


def test_generates_the_text_of_eager() -> None:
    model, ids = tiny("qwen3_next"), tokens()
    fuse_gates(model)
    texts = []
    for implementation in ("eager", "quernstone"):
        model.set_attn_implementation(implementation)
        texts.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        )
    assert torch.equal(*texts)


def test_the_gate_is_part_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("qwen3_next"), tokens()
    calls = _kinds(monkeypatch)
    run(model, "quernstone", input_ids=ids)
    fuse_gates(model)
    run(model, "quernstone", input_ids=ids)
    assert calls == [("vanilla", None), ("gated", (3, 4, 23, 16))]


def test_another_implementation_runs_the_layer_as_it_was() -> None:
    model, ids = tiny("qwen3_next"), tokens()
    want = run(model, "eager", input_ids=ids)
    fuse_gates(model)
    assert torch.equal(run(model, "eager", input_ids=ids), want)


def test_it_can_be_taken_back() -> None:
    model = tiny("qwen3_next")
    layer = model.get_submodule(LAYER)
    before = dict(vars(layer))
    for _ in range(2):
        fuse_gates(model)
        assert not hf_gates.unfused(model)
    unfuse_gates(model)
    unfuse_gates(model)
    assert hf_gates.unfused(model)
    assert vars(layer) == before


def test_a_copy_of_the_model_runs_its_own_layers() -> None:
    model, ids = tiny("qwen3_next"), tokens()
    fuse_gates(model)
    twin = copy.deepcopy(model)
    want = run(model, "quernstone", input_ids=ids)
    with torch.no_grad():
        model.get_submodule(LAYER).v_proj.weight.zero_()
    assert torch.equal(run(twin, "quernstone", input_ids=ids), want)


def test_qwen3_5_has_the_same_layer() -> None:
    import transformers as hf

    config = hf.Qwen3_5TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    model, ids = randomised(hf.Qwen3_5ForCausalLM(config)), tokens()
    want = run(model, "eager", input_ids=ids)
    assert fuse_gates(model) == [LAYER]
    assert_close(run(model, "quernstone", input_ids=ids), want)


def test_names_a_model_without_such_layers() -> None:
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM, expected layers of"):
        fuse_gates(tiny("llama"))


def test_leaves_a_forward_alone_that_somebody_else_replaced() -> None:
    model = tiny("qwen3_next")
    layer = model.get_submodule(LAYER)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=f"the forward of {LAYER} has been replaced"):
        fuse_gates(model)
