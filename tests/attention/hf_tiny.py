"""Small random models of transformers, and the two attention implementations side by side."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import register_with_transformers

BATCH, LENGTH, VOCABULARY, WIDTH, WINDOW = 3, 23, 97, 64, 5

CAUSAL = ("llama", "qwen3", "mistral", "gpt_oss", "qwen3_next")
"""Full attention; full and sliding; sliding; sliding and full with sinks; full, gated."""

# Sums of up to WIDTH products in another order differ by WIDTH times epsilon at worst; it is
# taken of the largest number among the results.
TOLERANCE = WIDTH * torch.finfo(torch.float32).eps


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products as small as these are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name: str, **changes: Any) -> Any:
    """A random model in eval mode whose attention decides its logits."""
    import transformers as hf

    register_with_transformers()
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    grouped = {**sizes, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts_per_tok": 2}
    match name:
        case "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**grouped | changes))
        case "qwen3":
            sliding = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**grouped | sliding | changes))
        case "mistral":
            sliding = {"sliding_window": WINDOW}
            model = hf.MistralForCausalLM(hf.MistralConfig(**grouped | sliding | changes))
        case "gpt_oss":
            rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
            more = {**experts, **rope, "num_local_experts": 4, "sliding_window": WINDOW}
            model = hf.GptOssForCausalLM(hf.GptOssConfig(**grouped | more | changes))
        case "qwen3_next":
            more = {
                **experts,
                "layer_types": ["linear_attention", "full_attention"],
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            }
            model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**grouped | more | changes))
        case "bert":
            model = hf.BertModel(hf.BertConfig(**sizes | changes))
        case _:
            raise ValueError(name)
    return randomised(model)


def randomised(model: Any) -> Any:
    """With weights large enough that a wrong mask shows."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length))


def padding(side: str | None, length: int = LENGTH) -> Tensor | None:
    """int64 [b, t], 0 for padding; one row is whole, one nearly empty."""
    if side is None:
        return None
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[0, :7] = 0
    mask[2, : length - 2] = 0
    return mask if side == "left" else mask.flip(1)


def run(model: Any, implementation: str, **inputs: Any) -> Tensor:
    """Logits, or the last hidden state of a model without."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def assert_close(got: Tensor, want: Tensor, mask: Tensor | None = None) -> None:
    """Equal up to TOLERANCE of the largest number, at the tokens that are no padding."""
    if mask is not None:
        got, want = got[mask.bool()], want[mask.bool()]
    error = (got - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE, f"{error:.2e} of the largest number, allowed {TOLERANCE:.2e}"
