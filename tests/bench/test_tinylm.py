"""The tiny language model: its text, its halves, its trainer, its files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import head_balance_loss, head_report, reference
from quernstone.bench.tinylm import checkpoint, corpus, train
from quernstone.bench.tinylm.checkpoint import BadCheckpoint
from quernstone.bench.tinylm.corpus import HELD_OUT, START, TRAIN
from quernstone.bench.tinylm.loop import mean_cv, same_bits
from quernstone.bench.tinylm.mixers import _rotate
from quernstone.bench.tinylm.model import Config, TinyLm
from tests.attention.tolerances import relative_error
from tests.bench.tiny import BALANCE, TEXT, config, recipe, trainer

KINDS = ("vanilla", "sink", "gated")
META = {"seed": 0, "command": "none", "corpus": {"sha256": "0"}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The text


def test_the_text_does_not_depend_on_the_order_of_the_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = corpus.documentation()
    backwards = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *a, **k: sorted(backwards(*a, **k), reverse=True))
    again = corpus.documentation.__wrapped__()
    assert again.sha256 == first.sha256
    assert again.text(HELD_OUT) == first.text(HELD_OUT)


def test_the_splits_hold_documents_apart_by_the_hash_of_their_names() -> None:
    found = corpus.documentation()
    assert not found.train.keys() & found.held_out.keys()
    assert all(corpus.is_held_out(name) for name in found.held_out)
    assert not any(corpus.is_held_out(name) for name in found.train)
    assert len(found.text(TRAIN)) > 8 * len(found.text(HELD_OUT)) > 800_000
    assert "topics.with" in found.train.keys() | found.held_out.keys()


def test_a_passage_that_stands_twice_is_learnt_and_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"m{n}" for n in range(100)]
    held_out = next(name for name in names if corpus.is_held_out(name))
    first, second = [name for name in names if not corpus.is_held_out(name)][:2]
    long = "x" * 100_000
    documents = [
        (held_out, ["in both", "measured", "measured"]),
        (first, [long, "learnt"]),
        (second, ["learnt", "in both"]),
    ]
    monkeypatch.setattr(corpus, "_modules", lambda _library: iter(documents))
    monkeypatch.setattr(corpus, "_topics", lambda: iter(()))
    found = corpus.documentation.__wrapped__()
    assert found.held_out == {held_out: "measured"}
    assert found.train == {first: f"{long}\n\nlearnt", second: "in both"}


def test_the_hash_changes_with_the_text_and_with_its_division() -> None:
    texts = [
        corpus.Corpus({"a": "x"}, {"b": "y"}),
        corpus.Corpus({"a": "x"}, {"b": "z"}),
        corpus.Corpus({"a": "x\n\ny"}, {}),
        corpus.Corpus({"b": "y"}, {"a": "x"}),
    ]
    assert len({text.sha256 for text in texts}) == len(texts)


def test_the_byte_that_starts_a_sequence_is_in_no_text() -> None:
    assert START not in corpus.documentation().text(TRAIN)
    assert START not in corpus.documentation().text(HELD_OUT)


def test_docstrings_are_those_of_the_interpreter() -> None:
    import inspect
    import json.decoder

    source = Path(inspect.getsourcefile(json.decoder) or "").read_bytes()
    found = list(corpus._docstrings(source))
    assert inspect.cleandoc(json.decoder.JSONDecoder.__doc__ or "").strip() in found
    assert inspect.cleandoc(json.decoder.JSONDecoder.decode.__doc__ or "").strip() in found


def test_a_python_without_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr(corpus, "_topics", lambda: iter(()))
    with pytest.raises(corpus.NoText, match="without its source files"):
        corpus.documentation.__wrapped__()


# The model


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_changes_no_logit_before_it(kind: str) -> None:
    model = TinyLm(config(kind))
    ids = torch.randint(1, 256, (2, 20))
    changed = ids.clone()
    changed[:, 12] += 1
    with torch.no_grad():
        one, other = model(ids).logits, model(changed % 256).logits
    assert torch.equal(one[:, :12], other[:, :12])
    assert not torch.allclose(one[:, 12:], other[:, 12:])


def test_rotation_leaves_lengths_and_makes_products_depend_on_distance() -> None:
    x, y = torch.randn(2, 16).double().unbind()
    turned = _rotate(torch.stack([x, y]).expand(9, 2, 16)[None].float())[0].double()
    products = turned[:, 0] @ turned[:, 1].T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    assert turned.norm(dim=-1)[:, 0] == pytest.approx(x.norm().item(), rel=1e-6)
    assert abs(products[0, 1] - products[0, 0]) > 1e-3


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = TinyLm(config(), seed=3).state_dict()
    torch.manual_seed(2)
    other = TinyLm(config(), seed=3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        one["embedding.weight"], TinyLm(config(), seed=4).state_dict()["embedding.weight"]
    )


def test_a_model_of_the_study_has_about_half_a_million_parameters() -> None:
    assert {TinyLm(Config(mixer=kind)).parameter_count() // 10_000 for kind in KINDS} == {44}


@pytest.mark.parametrize(("name", "value"), [("mixer", "mamba9"), ("ffn", "sparse")])
def test_an_unknown_half_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got '{value}', expected one of"):
        Config(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_head_report_sees_the_importance_that_training_sees(kind: str) -> None:
    model = TinyLm(config(kind), seed=1).eval()
    ids = torch.randint(1, 256, (2, 24))
    with torch.no_grad():
        want = model(ids).importance
    found = head_report(model, {"input_ids": ids, "labels": ids}, shares=(0.5,))
    assert set(found.kinds) == {kind}
    assert torch.from_numpy(found.importance).float().numpy() == pytest.approx(want.numpy())


# Training


@pytest.mark.parametrize("balance", [None, BALANCE])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_step_are_those_of_the_reference(kind: str, balance: Any) -> None:
    found = {}
    for name in ("ours", "reference"):
        one = trainer(kind, balance)
        if name == "reference":
            for block in one.model.blocks:
                block.mixer.attend = _reference
        total, _ = one.objective(0)
        total.backward()
        found[name] = {n: w.grad for n, w in one.model.named_parameters()}
    largest = max(float(g.norm()) for g in found["reference"].values())
    for name, want in found["reference"].items():
        got = found["ours"][name]
        assert want.norm() > 0, name
        # fp32 sums in another order: 32 rounding errors at most, of the largest gradient where
        # the weight's own is a small difference of large ones.
        assert (got - want).norm() < 32 * 2.0**-24 * max(largest, float(want.norm())), name


def _reference(*qkv: Tensor, **options: Any) -> tuple[Tensor, Any]:
    out, aux = reference.sink_attention(*qkv, **options)
    return out, aux._replace(importance=aux.importance.float())


@pytest.mark.parametrize("balance", [None, BALANCE])
def test_training_goes_on_bit_by_bit_where_it_was_stopped(tmp_path: Path, balance: Any) -> None:
    whole = trainer("sink", balance)
    whole.run()
    first = trainer("sink", balance)
    first.run(until=3)
    first.save(tmp_path / "state.pt")
    second = trainer("sink", balance)
    second.load(tmp_path / "state.pt")
    second.run()
    assert second.step == 6
    assert second.curve == whole.curve
    for name, weight in whole.trained.items():
        assert torch.equal(second.trained[name], weight), name


def test_training_is_the_same_on_every_run() -> None:
    one, other = trainer("gated", BALANCE), trainer("gated", BALANCE)
    one.run()
    torch.manual_seed(5)
    other.run()
    for name, weight in one.trained.items():
        assert torch.equal(other.trained[name], weight), name


def test_runs_of_one_seed_see_the_same_batches_with_and_without_the_loss() -> None:
    plain, balanced = trainer(), trainer(balance=BALANCE)
    for step in range(3):
        assert torch.equal(plain.batch(step)[1], balanced.batch(step)[1])
    assert not torch.equal(plain.batch(0)[1], plain.batch(1)[1])
    inputs, labels = plain.batch(0)
    assert (inputs[:, 0] == START).all()
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_the_objective_is_the_loss_and_the_balance_of_its_importance() -> None:
    plain, balanced = trainer("gated"), trainer("gated", BALANCE)
    loss, importance = plain.loss(0)
    assert importance is not None
    want = loss + head_balance_loss(importance, weight=BALANCE.weight)
    assert balanced.objective(0)[0].item() == pytest.approx(want.item(), rel=1e-6)
    assert want > loss


def test_balancing_lowers_the_variation_over_heads() -> None:
    found = {}
    for balance in (None, BALANCE):
        one = trainer("gated", balance, steps=12)
        one.run()
        found[balance] = train.evaluate(one.model, TEXT, context=32).cv
    assert found[BALANCE] < found[None]


def test_the_rate_warms_up_in_a_line_and_falls_as_half_a_cosine() -> None:
    one = recipe(steps=102)
    rates = [one.rate(step) / one.learning_rate for step in range(103)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert rates[52] == pytest.approx(0.55)
    assert rates[102] == pytest.approx(0.1)


def test_sinks_learn_faster_and_vectors_do_not_decay() -> None:
    one = trainer("sink")
    one.run(until=1)
    rates = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in one._optimizer.param_groups
        for weight in group["params"]
    }
    rate = one.recipe.rate(0)
    assert rates[id(one.trained["blocks.0.mixer.sinks"])] == (10 * rate, 0.0)
    assert rates[id(one.trained["norm.weight"])] == (rate, 0.0)
    assert rates[id(one.trained["blocks.0.mixer.qkv.weight"])] == (rate, 0.1)
    assert len(rates) == len(one.trained)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other"])
def test_a_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    one = trainer()
    one.save(path)
    whole = path.read_bytes()
    if damage == "other":
        torch.save([1, 2, 3], path)
    else:
        broken = {"cut": whole[: len(whole) // 2], "garbage": b"\x80garbage" * 99, "empty": b""}
        path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=r"state\.pt: got a damaged file .* remove it"):
        one.load(path)


def test_a_state_of_another_recipe_or_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    trainer().save(path)
    with pytest.raises(ValueError, match=r"state\.pt: got \{.*expected \{"):
        trainer(steps=7).load(path)
    with pytest.raises(ValueError, match="weights of another model"):
        trainer("gated").load(path)


def test_numbers_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1"):
        recipe(steps=0)
    with pytest.raises(ValueError, match="text: got 5 bytes, expected 32 or more"):
        train.Trainer(TinyLm(config()), b"short", recipe())
    with pytest.raises(ValueError, match="text: got 5 bytes, expected 32 or more"):
        train.evaluate(TinyLm(config()), b"short", context=32)


# Measuring


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte() -> None:
    model = TinyLm(config())
    torch.nn.init.zeros_(model.embedding.weight)
    assert train.evaluate(model, TEXT, context=32).bits_per_byte == pytest.approx(8.0, rel=1e-6)


def test_bits_per_byte_are_those_of_torch_over_every_window() -> None:
    model = TinyLm(config("vanilla"), seed=2)
    found = train.evaluate(model, TEXT, context=40, batch=7)
    labels = train.windows(TEXT, 40)
    with torch.no_grad():
        output = model(train.shifted(labels), labels)
    odds = output.logits.double().log_softmax(-1).gather(-1, labels[..., None])
    assert found.bits_per_byte == pytest.approx(-odds.mean().item() / math.log(2), rel=1e-6)
    assert found.bytes == len(TEXT) // 40 * 40
    assert torch.tensor(found.importance).numpy() == pytest.approx(output.importance.numpy())


def test_mean_cv_is_numpys_over_the_heads_and_survives_closed_gates() -> None:
    x = torch.tensor([[0.1, 0.4, 0.7], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    first = x[0].double().numpy()
    assert mean_cv(x) == pytest.approx(first.std() / first.mean() / 3)


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with same_bits(2):
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, True)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_back_the_model_in_bf16(tmp_path: Path, kind: str) -> None:
    model = TinyLm(config(kind), seed=7)
    path = tmp_path / "a.npz"
    checkpoint.save(path, model, META)
    found = checkpoint.load(path)
    assert found.model.config == model.config
    assert found.meta["command"] == "none"
    assert not found.model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight.bfloat16().float()), name
    assert relative_error(found.model.norm.weight.detach(), model.norm.weight.detach()) <= 2.0**-8


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, TinyLm(config()), META)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    broken = [b"", b"garbage" * 9, *(whole[:cut] for cut in (3, middle, len(whole) - 9)), flipped]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=r"a\.npz: got a file that cannot be read \("):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.npz")


def test_a_checkpoint_of_another_shape_than_it_says_is_refused(tmp_path: Path) -> None:
    model = TinyLm(config())
    model.config = Config(mixer="gated", layers=2, channels=32, heads=4, hidden=32)
    checkpoint.save(tmp_path / "a.npz", model, META)
    with pytest.raises(BadCheckpoint):
        checkpoint.load(tmp_path / "a.npz")
