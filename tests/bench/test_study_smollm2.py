"""Fine-tuning by low-rank updates, on a random model as small as a test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quernstone.attention import head_balance_loss, head_report
from quernstone.bench.study import smollm2
from quernstone.bench.study.parts import SmolRecipe
from quernstone.bench.tinylm import corpus
from quernstone.bench.tinylm.loop import Balance
from tests.attention import hf_tiny

TOKENS = torch.arange(400) * 7 % hf_tiny.VOCABULARY
BALANCE = Balance(weight=0.1, shared=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model() -> Any:
    torch.manual_seed(0)
    return hf_tiny.tiny("llama", attn_implementation="quernstone")


def _recipe(steps: int = 4, balance: Balance | None = BALANCE) -> SmolRecipe:
    return SmolRecipe(
        steps=steps, balance=balance, tokens=24, rank=4, warmup=1, threads=1, held_out_windows=3
    )


def _tuner(**changes: Any) -> smollm2.Tuner:
    return smollm2.Tuner(_model(), TOKENS, _recipe(**changes))


def test_an_update_begins_as_none_and_is_all_that_is_trained() -> None:
    ids = TOKENS[None, :24]
    with torch.no_grad():
        want = _model()(input_ids=ids).logits
    tuner = _tuner()
    with torch.no_grad():
        assert torch.equal(tuner.model(input_ids=ids).logits, want)
    assert len(tuner.trained) == 2 * 4 * 2
    before = {name: weight.clone() for name, weight in tuner.model.state_dict().items()}
    tuner.run()
    changed = {
        name for name, weight in tuner.model.state_dict().items() if not weight.equal(before[name])
    }
    assert changed
    assert all(name.endswith((".up", ".down")) for name in changed)
    assert len(changed) == len(tuner.trained)


def test_an_update_is_the_product_of_its_two_matrices() -> None:
    base = torch.nn.Linear(6, 5, bias=False)
    lora = smollm2.Lora(base, 2, 8.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(lora.up)
    x = torch.randn(3, 6)
    merged = base.weight + 4.0 * lora.up @ lora.down
    assert lora(x).detach().numpy() == pytest.approx((x @ merged.T).detach().numpy(), abs=1e-5)


def test_the_objective_is_the_models_loss_and_the_balance_of_its_importance() -> None:
    tuner = _tuner()
    ids = tuner.window(0)
    total, figures = tuner.objective(0)
    with torch.no_grad():
        plain = _model()
        loss = plain(input_ids=ids, labels=ids).loss
        importance = torch.from_numpy(
            head_report(plain, {"input_ids": ids}, ablation=False).importance
        )
    want = loss + head_balance_loss(importance, weight=0.1, shared=1)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    assert figures[0] == pytest.approx(loss.item(), rel=1e-6)
    assert want > loss


def test_fine_tuning_goes_on_bit_by_bit_where_it_was_stopped(tmp_path: Path) -> None:
    whole = _tuner()
    whole.run()
    first = _tuner()
    first.run(until=2)
    first.save(tmp_path / "state.pt")
    second = _tuner()
    second.load(tmp_path / "state.pt")
    second.run()
    assert second.curve == whole.curve
    for name, weight in whole.trained.items():
        assert torch.equal(second.trained[name], weight), name


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: got 5, expected 24 or more"):
        smollm2.Tuner(_model(), TOKENS[:5], _recipe())


class _Bytes:
    """A tokenizer of one or two characters a token, in the place of the real one."""

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) % hf_tiny.VOCABULARY for char in text]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return "ab" if token % 2 else "a"


def test_bits_per_byte_are_those_of_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus.Corpus({"a": "x"}, {"b": "the quick brown fox jumps. " * 9})
    monkeypatch.setattr(smollm2, "documentation", lambda: text)
    model, tokenizer = _model(), _Bytes()
    found = smollm2.measure(model, tokenizer, _recipe())
    tokens = torch.tensor(tokenizer(text.text("held-out").decode())["input_ids"])
    windows = tokens[: len(tokens) // 24 * 24].view(-1, 24)[::3][:3]
    nats = bytes_read = 0.0
    with torch.no_grad():
        for window in windows:
            odds = model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
            nats -= odds.gather(-1, window[1:, None]).sum().item()
            bytes_read += sum(len(tokenizer.convert_ids_to_tokens(t)) for t in window[1:].tolist())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_read, rel=1e-6)
    assert found["held_out_bytes"] == bytes_read
    assert len(found["drain"]["norm"]) == 2
    assert sum(found["gates"]) == pytest.approx(1.0, abs=1e-4)


def test_a_part_of_no_steps_measures_the_model_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = corpus.Corpus({"a": "one word after another. " * 9}, {"b": "the quick fox jumps. " * 9})
    monkeypatch.setattr(smollm2, "documentation", lambda: text)
    monkeypatch.setattr("quernstone.attention.models.load_smollm2", lambda: (_model(), _Bytes()))
    results = {}
    for steps in (0, 2):
        part: Any = SimpleNamespace(
            file=f"smol{steps}", setting={"recipe": _recipe(steps).to_dict(), "revision": 1}
        )
        results[steps] = smollm2.run(part, tmp_path)
    assert results[0]["curve"] == []
    assert results[2]["curve"][-1][0] == 2
    assert results[0]["bits_per_byte"] != results[2]["bits_per_byte"]
    assert not (tmp_path / "smol0.pt").exists()
    assert (tmp_path / "smol2.pt").exists()


def test_a_byte_level_token_is_as_long_as_the_text_it_spells() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "naïve – π ≠ 3,\n\tsays the doc"
    wrapped = SimpleNamespace(convert_ids_to_tokens=tokenizer.id_to_token)
    size = smollm2._byte_lengths(wrapped)
    assert sum(map(size, tokenizer.encode(text).ids)) == len(text.encode())
