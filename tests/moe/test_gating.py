"""Dropping experts: the rule, its hooks in real models, the search for a threshold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from quernstone.moe import (
    AdaptiveGating,
    drop_experts,
    layer_sensitivity,
    moe_blocks,
    prediction_accuracy,
    record_routing,
    search_threshold,
    threshold_candidates,
)
from quernstone.moe.gating import tail_shares

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def small_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mixtral":
        config = MixtralConfig(
            **SMALL, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
        )
        return MixtralForCausalLM(config).eval()
    if name == "qwen2":
        qwen = Qwen2MoeConfig(
            **SMALL,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=3,
        )
        return Qwen2MoeForCausalLM(qwen).eval()
    if name == "deepseek":
        deepseek = DeepseekV2Config(
            **SMALL,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=6,
            n_shared_experts=1,
            num_experts_per_tok=3,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
        return DeepseekV2ForCausalLM(deepseek).eval()
    olmoe = OlmoeConfig(**SMALL, intermediate_size=24, num_experts=6, num_experts_per_tok=3)
    return OlmoeForCausalLM(olmoe).eval()


MODELS = ("mixtral", "qwen2", "olmoe", "deepseek")


def tokens(count: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(64, (1, count), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module) -> object:
    return lambda batch: model(batch)


def test_two_experts_are_adapmoes_rule() -> None:
    """Drop the second where (1 - a)^2 F <= T; the repository compares with sqrt(T / F)."""
    generator = torch.Generator().manual_seed(0)
    first = 0.5 + 0.5 * torch.rand(200, generator=generator)
    weights = torch.stack([first, 1 - first], 1)
    ids = torch.tensor([[3, 5]]).expand(200, 2)
    for sensitivity, threshold in itertools.product((46.7, 4.17, 0.0229), (0.001, 0.005, 0.013)):
        kept, scaled = drop_experts(ids, weights, sensitivity, threshold)
        single = weights[:, 1].double() <= (threshold / sensitivity) ** 0.5
        assert torch.equal(kept[:, 1] == -1, single)
        assert torch.equal(scaled[single], torch.tensor([[1.0, 0.0]]).expand(int(single.sum()), 2))
        assert torch.equal(scaled[~single], weights[~single])


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8),
    st.floats(0, 100),
    st.floats(0, 10),
)
def test_any_number_of_experts(row: list[float], sensitivity: float, threshold: float) -> None:
    """By the definition: the smallest j of which the tail weighs little enough."""
    weights = torch.tensor([row])
    ids = torch.arange(len(row))[None]
    kept, scaled = drop_experts(ids, weights, sensitivity, threshold)
    ordered = sorted(weights.double()[0].tolist(), reverse=True)
    total = sum(ordered)
    want = len(row)
    for j in range(len(row), 0, -1):
        tail = sum(sorted(ordered[j:])) / max(total, 1e-300)
        if tail**2 * sensitivity > threshold:
            break
        want = j
    got = int((kept >= 0).sum())
    if got != want:  # a tie to the last bit
        tail = sum(sorted(ordered[min(got, want) :])) / max(total, 1e-300)
        assert tail**2 * sensitivity == pytest.approx(threshold, rel=1e-12)
    assert float(scaled.double().sum()) == pytest.approx(total, rel=1e-6, abs=1e-30)
    # What is kept weighs no less than what is dropped.
    if 0 < got < len(row):
        assert weights[kept >= 0].min() >= weights[kept < 0].max()


def test_nothing_is_dropped_at_zero_and_all_but_one_at_infinity() -> None:
    weights = torch.tensor([[0.1, 0.6, 0.3]])
    ids = torch.tensor([[7, 8, 9]])
    kept, scaled = drop_experts(ids, weights, 1.0, 0.0)
    assert torch.equal(kept, ids)
    assert torch.equal(scaled, weights)
    kept, scaled = drop_experts(ids, weights, 1.0, 1e30)
    assert kept.tolist() == [[-1, 8, -1]]
    assert scaled[0, 1] == pytest.approx(1.0)
    # Places and ids stay as they came; a layer nobody minds keeps one expert.
    assert drop_experts(ids, weights, 0.0, 0.0)[0].tolist() == [[-1, 8, -1]]


@pytest.mark.parametrize("name", MODELS)
def test_a_gated_model_is_the_model_with_fewer_experts(name: str) -> None:
    """Against a model whose routers' weights are masked by hand."""
    model = small_model(name)
    x = tokens()
    sensitivity = {block.name: 1.0 for block in moe_blocks(model)}
    with torch.no_grad():
        before = model(x).logits
        with AdaptiveGating(sensitivity, 0.0).on(model):
            assert torch.allclose(model(x).logits, before, atol=1e-6)
        gating = AdaptiveGating(sensitivity, 1e30)
        with gating.on(model):
            single = model(x).logits
        use = gating.use()
        assert use == (1.0, 1.0)
        assert not torch.allclose(single, before, atol=1e-6)
        assert torch.equal(model(x).logits, before)
        mine = [b.router.register_forward_hook(_only_the_first) for b in moe_blocks(model)]
        expected = model(x).logits
        for hook in mine:
            hook.remove()
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="got no token"):
        gating.use()


def _only_the_first(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> object:
    logits, weights, ids = output
    best = weights.argmax(1, keepdim=True)
    one = torch.zeros_like(weights).scatter_(1, best, weights.sum(1, keepdim=True))
    return logits, one, ids


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_what_the_model_chose(name: str) -> None:
    model = small_model(name)
    trace = record_routing(model, [tokens(), tokens(7, seed=2)], run(model), meta={"seed": 1})
    blocks = moe_blocks(model)
    assert trace.ids.shape[:2] == (len(blocks), 47)
    assert trace.number_of_steps == 47
    assert trace.meta == {"seed": 1}
    assert trace.scores is not None
    assert trace.scores.sum(-1) == pytest.approx(1.0, abs=2e-3)
    # The best of the softmax is the first of the choice, where fp16 tells them apart.
    top = trace.scores.argmax(-1)
    assert (top == trace.ids[:, :, 0]).mean() > 0.98
    prompts = record_routing(model, [tokens(), tokens(7, seed=2)], run(model), step_tokens=None)
    assert prompts.number_of_steps == 2
    assert np.array_equal(prompts.ids, trace.ids)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_counted(name: str) -> None:
    """Against routers that are asked by hand."""
    model = small_model(name)
    blocks = moe_blocks(model)
    inputs: list[Tensor] = []
    chosen: list[Tensor] = []
    hooks = [
        block.router.register_forward_hook(
            lambda _m, given, output: (
                (inputs.append(given[0]), chosen.append(output[2]))[-1] and None
            )
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    found = prediction_accuracy(model, [tokens()], run(model), distance=2)
    assert np.isnan(found[0]).all()
    with torch.no_grad():
        for layer in range(1, len(blocks)):
            for d in range(1, min(layer, 2) + 1):
                guess = blocks[layer].router(inputs[layer - d])[2]
                want = np.mean(
                    [
                        len(set(a) & set(b)) / len(a)
                        for a, b in zip(guess.tolist(), chosen[layer].tolist(), strict=True)
                    ]
                )
                assert found[layer, d - 1] == pytest.approx(want)


def test_sensitivity_is_of_the_blocks() -> None:
    model = small_model("mixtral")

    def loss(of: nn.Module, batch: Tensor) -> Tensor:
        return of(batch, labels=batch).loss

    found = layer_sensitivity(model, [tokens(12), tokens(12, seed=3)], loss)
    assert list(found) == [block.name for block in moe_blocks(model)]
    assert all(value > 0 for value in found.values())


def test_the_search_takes_the_largest_threshold_within_the_tolerance() -> None:
    losses = {0.0: 2.0, 0.1: 1.999, 0.2: 2.009, 0.3: 2.02, 0.4: 2.005}
    found = search_threshold(losses.__getitem__, [0.4, 0.1, 0.3, 0.2], tolerance=0.005)
    assert (found.threshold, found.loss, found.base) == (0.2, 2.009, 2.0)
    assert found.tried == tuple(losses.items())
    assert search_threshold(lambda t: 1.0 + t, [0.5], tolerance=0.0).threshold == 0.0
    with pytest.raises(ValueError, match="loss: got nan"):
        search_threshold(lambda t: float("nan"), [0.5], tolerance=0.1)


def test_candidates_drop_equal_shares_of_the_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(1000, 3, generator=generator) for _ in range(2)]
    sensitivity = [2.0, 0.1]
    candidates = threshold_candidates(weights, sensitivity, 3)
    for share, threshold in zip((0.25, 0.5, 0.75), candidates, strict=True):
        ids = torch.zeros(1000, 3, dtype=torch.int64)
        dropped = [
            float((drop_experts(ids, w, f, threshold)[0] < 0).sum()) / 2000
            for w, f in zip(weights, sensitivity, strict=True)
        ]
        got = np.mean(dropped)
        assert got == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("weights", "sensitivity", "message"),
    [
        (torch.ones(3, 1), 1.0, "weights: got no expert but first ones"),
        (torch.ones(0, 2), 1.0, "weights: got no expert but first ones"),
        (torch.full((3, 2), torch.nan), 1.0, "weights: got numbers that are not finite"),
        (torch.ones(3, 2), torch.nan, "sensitivity: got nan, expected 0 or more"),
        (torch.ones(3, 2), -1.0, "sensitivity: got -1.0, expected 0 or more"),
    ],
)
def test_what_gives_no_candidates_is_refused(
    weights: Tensor, sensitivity: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        threshold_candidates([weights], [sensitivity])


def test_tail_shares_keep_small_tails() -> None:
    weights = torch.tensor([[1.0, 1e-12, 1e-13]], dtype=torch.float64)
    assert tail_shares(weights)[0].tolist() == pytest.approx([1.1e-12, 1e-13], rel=1e-6)


def test_names_what_is_wrong() -> None:
    ids, weights = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="sensitivity: got -1"):
        drop_experts(ids, weights, -1.0, 0.1)
    with pytest.raises(ValueError, match="threshold: got nan"):
        drop_experts(ids, weights, 1.0, float("nan"))
    with pytest.raises(ValueError, match="weights: got a number that is negative or not finite"):
        drop_experts(ids, weights * torch.nan, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"weights\.shape"):
        drop_experts(ids, weights[:1], 1.0, 0.1)
    with pytest.raises(ValueError, match="model: got Linear without a module"):
        moe_blocks(nn.Linear(2, 2))
    model = small_model("mixtral")
    with (
        pytest.raises(ValueError, match=r"sensitivity: got none for 'model\.layers\.0"),
        AdaptiveGating({}, 0.1).on(model),
    ):
        pass
    with pytest.raises(ValueError, match="batches: got none"):
        record_routing(model, [], run(model))
    with pytest.raises(ValueError, match="distance: got 0"):
        prediction_accuracy(model, [tokens()], run(model), distance=0)
    with torch.no_grad():
        moe_blocks(model)[1].router.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits that are not finite"):
        record_routing(model, [tokens()], run(model))
