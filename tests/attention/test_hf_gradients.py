"""Training through attn_implementation="quernstone": the gradients of eager attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention.hf_gates import fuse_gates

from .hf_tiny import CAUSAL, padding, tiny, tokens

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

# Two sides that both sum in fp32, layer upon layer. The second number is a share of all gradients
# together: that of a bias on every key is 0 but for rounding.
ALLOWED, ROUNDING = 2e-5, 1e-7


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    whole = torch.cat([x.flatten() for x in want.values()]).norm()
    for name, x in want.items():
        assert (got[name] - x).norm() <= ALLOWED * x.norm() + ROUNDING * whole, name


def _gradients(model: Any, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask)
    result = output.logits if "logits" in output else output.last_hidden_state
    if mask is not None:
        result = result[mask.bool()]
    result.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_gradients_of_every_weight_are_those_of_eager(name: str, side: str | None) -> None:
    model, ids, mask = tiny(name), tokens(), padding(side)
    model.set_attn_implementation("eager")
    want = _gradients(model, ids, mask)
    model.set_attn_implementation("quernstone")
    got = _gradients(model, ids, mask)
    _assert_close(got, want)


def test_gradients_of_fused_gates_are_those_of_eager() -> None:
    model, ids = tiny("qwen3_next"), tokens()
    model.set_attn_implementation("eager")
    want = _gradients(model, ids, None)
    model.set_attn_implementation("quernstone")
    fuse_gates(model)
    got = _gradients(model, ids, None)
    _assert_close(got, want)


@pytest.mark.parametrize("name", CAUSAL)
def test_mixed_precision_is_as_near_to_fp32_as_that_of_eager(name: str) -> None:
    # With all experts at work no rounding changes the choice.
    changes = {"num_experts_per_tok": 4} if name in ("gpt_oss", "qwen3_next") else {}
    model, ids = tiny(name, **changes), tokens()
    # A cache joins keys and values in one type; training has none.
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    want = _gradients(model, ids, None)
    rounded = {}
    for implementation in ("eager", "quernstone"):
        model.set_attn_implementation(implementation)
        if name == "qwen3_next" and implementation == "quernstone":
            fuse_gates(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded[implementation] = _gradients(model, ids, None)
    off = {
        implementation: torch.cat([(got[x] - want[x]).flatten() for x in want]).norm()
        for implementation, got in rounded.items()
    }
    # Not the same roundings: two draws of one size.
    assert off["quernstone"] <= 2.0 * off["eager"]


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = tiny("gpt_oss"), tokens()
    model.set_attn_implementation("quernstone")
    want = _gradients(model, ids, None)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = _gradients(model, ids, None)
    for weight in want:
        assert torch.equal(got[weight], want[weight]), weight
