"""tinylm with experts: the block, its training, and what is committed of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from quernstone.bench.tinylm import checkpoint
from quernstone.bench.tinylm import experts as tiny
from quernstone.bench.tinylm.corpus import HELD_OUT, documentation
from quernstone.bench.tinylm.ffn import Moe
from quernstone.bench.tinylm.model import Config, TinyLm
from quernstone.bench.tinylm.train import evaluate
from quernstone.moe import moe_blocks

SMALL = Config("vanilla", "moe", 2, 32, 4, 16, 16, experts=6, top_k=2)


def test_the_block_is_qwens() -> None:
    config = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    theirs = Qwen3MoeSparseMoeBlock(config).eval()
    ours = Moe(SMALL)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 9, 32)
        found = theirs(x)
        want = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(ours(x), want.view_as(x), rtol=1e-5, atol=1e-6)


def test_the_balance_loss_is_one_at_balance_and_the_experts_at_collapse() -> None:
    block = Moe(SMALL)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block(torch.randn(1, 50, 32))
        assert block.balance is not None
        assert float(block.balance) == pytest.approx(1.0)
        block.gate.weight[:2] = 100.0
        block(torch.ones(1, 50, 32))
        assert float(block.balance) == pytest.approx(3.0)


def test_gradients_reach_router_and_experts() -> None:
    model = TinyLm(SMALL)
    x = torch.randint(256, (2, 32))
    output = model(x, x)
    (output.loss + output.router_balance).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert bool(weight.grad.any()), name


def test_training_learns_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    text = (b"the quick brown fox jumps over the lazy dog. " * 100)[:4096]
    recipe = tiny.MoeRecipe(steps=30, batch=4, context=32, warmup=5)

    def train(until: int | None, state: Path | None) -> TinyLm:
        model = TinyLm(SMALL)
        trainer = tiny.MoeTrainer(model, text, recipe)
        if state is not None and state.exists():
            trainer.load(state)
        trainer.run(until=until, state=state)
        return model

    whole = train(None, None)
    state = tmp_path / "state.pt"
    train(11, state)
    resumed = train(None, state)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    before = evaluate(TinyLm(SMALL), text, context=32).bits_per_byte
    assert evaluate(whole, text, context=32).bits_per_byte < 0.7 * before


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_what_is_committed_belongs_together(name: str) -> None:
    """The trace is what the committed weights choose; sizes are as promised."""
    found = checkpoint.load(tiny.path_of(name))
    assert found.model.config == tiny.CONFIGS[name]
    assert 5e6 <= found.model.parameter_count() <= 8e6
    assert tiny.path_of(name).stat().st_size <= 12e6
    assert tiny.trace_path_of(name).stat().st_size <= 4e6
    trace = tiny.load_trace(name)
    assert (trace.experts, trace.top_k) == (SMALL_OF[name])
    assert trace.tokens == trace.number_of_steps == tiny.TRACED_TOKENS[name]
    assert len(moe_blocks(found.model)) == trace.layers
    if documentation().describe() != trace.meta["corpus"]:
        return  # another Python has another text
    again = tiny.trace(found.model, 512, {})
    # A choice between equals to the last bits may differ with the number of threads.
    assert (again.ids == trace.ids[:, :512]).mean() > 0.999


SMALL_OF = {"top2of16": (16, 2), "top6of64": (64, 6)}


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_the_models_have_learnt_and_use_their_experts(name: str) -> None:
    found = checkpoint.load(tiny.path_of(name))
    text = documentation().text(HELD_OUT)[: 256 * 40]
    measured = evaluate(found.model, text).bits_per_byte
    assert measured < 2.6
    trace = tiny.load_trace(name)
    for layer in range(trace.layers):
        loads = np.bincount(trace.ids[layer].ravel(), minlength=trace.experts)
        # No expert has collapsed, and they are not all alike.
        assert (loads > 0).mean() > 0.9
        assert loads.max() > 1.2 * loads.mean()


def test_config_names_what_contradicts() -> None:
    with pytest.raises(ValueError, match="top_k: got 3, expected 1 to 2"):
        Config(ffn="moe", experts=2, top_k=3)
    with pytest.raises(ValueError, match="experts: got 4 with 'dense'"):
        Config(experts=4)
    with pytest.raises(ValueError, match="name: got 'top9'"):
        tiny.load("top9")
    assert "experts" not in Config().to_dict()
    assert Config(**SMALL.to_dict()) == SMALL
