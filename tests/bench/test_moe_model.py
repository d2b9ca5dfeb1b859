"""The whole models of the benchmarks: the same weights on every side, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quernstone.bench.cases import moe_model as cases
from quernstone.bench.rivals import ik_llama, ik_model
from quernstone.bench.tinylm import experts as tiny

PROBE = [7, 123, 45]


def small() -> Any:
    from transformers import MixtralForCausalLM

    config = cases.mixtral_config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return 1 + 0.1 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    cases.materialize(model, weight)
    return model.eval()


def last_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROBE]), logits_to_keep=1).logits[0, -1]
    return found


def test_a_trained_model_keeps_its_outputs_as_a_mixtral() -> None:
    model = tiny.load("top2of16")
    windows = next(tiny.batches("held-out"))[:, :32]
    with torch.no_grad():
        want = model(windows.long()).logits
        got = cases.of_tinylm(model)(windows.long()).logits
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_the_plain_sums_are_those_of_transformers() -> None:
    model = small()
    of = ik_model.model_of(model.config)
    with torch.no_grad():
        got = ik_model.logits(of, cases.weight_of(model), PROBE, onto_normed=False)
    want = last_logits(model)
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_packed_copy_leaves_the_model_and_says_what_it_computes_with() -> None:
    model = small()
    before = last_logits(model)
    packed = cases.packed_copy(model)
    assert packed.quernstone.compiled
    assert torch.equal(last_logits(model), before)
    of = ik_model.model_of(model.config)
    with torch.no_grad():
        want = ik_model.logits(of, cases.packed_weight_of(packed), PROBE, onto_normed=False)
    assert float((last_logits(packed) - want).norm() / want.norm()) < 0.05


def test_ik_llama_reads_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("ik_llama_cpp")
    model = small()
    path = tmp_path / "small.gguf"
    ik_model.write_mixtral(path, model.config, lambda name: model.get_parameter(name), "Q8_0")
    session = ik_llama.Session(path, threads=1)
    got = torch.from_numpy(session.step(PROBE))
    session.close()
    of = ik_model.model_of(model.config)
    with torch.no_grad():
        want = ik_model.logits(of, cases.weight_of(model), PROBE, onto_normed=True)
    assert float((got - want).norm() / want.norm()) < 0.03
