"""The balancer in one process: what it records, the exact gradient, and what it leaves behind."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quernstone.attention import (
    HeadBalancer,
    head_balance_loss,
    head_report,
    most_important,
    schedules,
)
from quernstone.attention.hf import PROBE

from .hf_tiny import padding, tiny, tokens
from .tolerances import U_FP32

pytest.importorskip("transformers")

# Gradients of the same numbers that were summed in another order. The loss depends on differences
# between importances, which are known to 8 u: the smaller their variation, the more that is.
SAME = 1e-6


def allowed(cv: float) -> float:
    return SAME + 8 * U_FP32 / cv


def training(name: str = "gpt_oss", **changes: Any) -> Any:
    model = tiny(name, **changes)
    model.set_attn_implementation("quernstone")
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], cv: float) -> None:
    assert got.keys() == want.keys()
    whole = torch.cat([x.flatten() for x in want.values()]).norm()
    assert whole > 0
    for name, x in want.items():
        assert (got[name] - x).norm() <= allowed(cv) * x.norm() + SAME * whole, name


def batch(side: str | None = "right") -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": padding(side)}


def rows(whole: dict[str, Any], which: slice) -> dict[str, Any]:
    return {name: x[which] for name, x in whole.items()}


def alone(model: Any, balancer: HeadBalancer, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the head-balance loss by itself."""
    model(**inputs)
    balancer.loss().backward()
    return gradients(model)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3", "qwen3_next"])
def test_importances_are_those_of_the_head_report(name: str, side: str | None) -> None:
    model, inputs = tiny(name), batch(side)
    model.set_attn_implementation("quernstone")
    want = head_report(model, inputs, ablation=False)
    with HeadBalancer(model.train(), weight=0.1) as balancer:
        model(**inputs)
        loss = balancer.loss()
    assert list(balancer.importance) == list(want.layers)
    found = torch.stack(list(balancer.importance.values())).double()
    torch.testing.assert_close(found, torch.from_numpy(want.importance), rtol=1e-6, atol=0)
    assert balancer.mean_cv == pytest.approx(want.cv.mean(), rel=1e-5)
    assert balancer.mean_gate == pytest.approx(want.importance.mean(), rel=1e-6)
    assert loss.item() == pytest.approx(head_balance_loss(found, weight=0.1).item(), rel=1e-5)
    assert loss.dtype == torch.float32


def test_the_gradient_is_that_of_eager_attention() -> None:
    """1 - the weight of the sink, and 1 - the weight of the first key, from S x S matrices."""
    for name in ("gpt_oss", "llama"):
        model, inputs = training(name), {"input_ids": tokens()}
        with HeadBalancer(model, weight=1.0) as balancer:
            got = alone(model, balancer, inputs)
        model.set_attn_implementation("eager")
        attentions = model(**inputs, output_attentions=True).attentions
        if name == "gpt_oss":
            gate = [a.sum(-1) for a in attentions]
        else:
            gate = [1.0 - a[:, :, 1:, 0] for a in attentions]
        head_balance_loss([g.mean((0, 2)) for g in gate], weight=1.0).backward()
        want = gradients(model)
        whole = torch.cat([x.flatten() for x in want.values()]).norm()
        for weight, x in want.items():
            assert (got[weight] - x).norm() <= 1e-4 * x.norm() + 1e-6 * whole, (name, weight)


def test_passes_without_a_loss_between_them_are_one_batch() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        want = alone(model, balancer, whole)
        value = balancer.importance
        for which in (slice(0, 1), slice(1, 3)):
            model(**rows(whole, which))
        balancer.loss().backward()
    assert_same(gradients(model), want, balancer.mean_cv)
    for name, x in balancer.importance.items():
        torch.testing.assert_close(x, value[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
@pytest.mark.parametrize("side", [None, "right"])
def test_measured_micro_batches_add_up_to_the_whole_batch(name: str, side: str | None) -> None:
    model, whole = training(name), batch(side)
    whole = {n: x for n, x in whole.items() if x is not None}
    options = {"weight": 0.5, "shared": 1, "correction": 1}
    with HeadBalancer(model, **options) as balancer:
        model(**whole)
        loss = balancer.loss()
        loss.backward()
        want = gradients(model)
        parts = [rows(whole, slice(0, 1)), rows(whole, slice(1, 3))]
        balancer.measure(parts)
        total = 0.0
        for part in parts:
            model(**part)
            share = balancer.loss(micro_batches=2)
            share.backward()
            total += share.item()
    assert_same(gradients(model), want, balancer.mean_cv)
    assert total == pytest.approx(loss.item(), rel=1e-5)


def test_separate_micro_batches_are_their_mean() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model, accumulation="separate") as balancer:
        parts = [rows(whole, slice(0, 1)), rows(whole, slice(1, 3))]
        singles = []
        for part in parts:
            model(**part)
            singles.append(balancer.loss())
        want = torch.autograd.grad(sum(singles) / 2, [model.model.layers[0].self_attn.sinks])
        balancer.measure(parts)
        for part in parts:
            model(**part)
            balancer.loss(micro_batches=2).backward()
    got = model.model.layers[0].self_attn.sinks.grad
    torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-9)


def test_measuring_leaves_the_random_numbers_and_the_mode_as_they_were() -> None:
    model, whole = training("llama"), {"input_ids": tokens()}
    dropout = nn.Dropout(0.5)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: dropout(out))
    last = "model.layers.1.self_attn"
    with HeadBalancer(model, accumulation="separate") as balancer:
        balancer.measure([whole])
        measured = balancer.importance[last]
        assert model.training
        model(**whole)
        balancer.loss()
        assert torch.equal(balancer.importance[last], measured)
        model(**whole)
        balancer.loss()
        assert not torch.equal(balancer.importance[last], measured)
        dropout.eval()
        model.eval()
        balancer.measure([whole])
        assert not model.training


def test_shared_heads_can_be_frozen_at_what_was_measured() -> None:
    model, whole = training(), batch()
    model.eval()
    with HeadBalancer(model) as balancer:
        balancer.measure([whole])
    sets = most_important(list(balancer.importance.values()), 2)
    model.train()
    with HeadBalancer(model, shared_heads=sets) as frozen:
        model(**whole)
        got = frozen.loss()
    with HeadBalancer(model, shared=2) as moving:
        model(**whole)
        torch.testing.assert_close(got, moving.loss())


def test_skipped_layers_and_tokens() -> None:
    model, whole = training(num_hidden_layers=3), batch(None)
    del whole["attention_mask"]
    with HeadBalancer(model, skip_layers=2, skip_first=4) as balancer:
        model(**whole)
        loss = balancer.loss()
        found = list(balancer.importance.values())
        torch.testing.assert_close(loss, head_balance_loss(found[2:]), rtol=1e-5, atol=0)
    with HeadBalancer(model) as balancer:
        model(**whole)
        balancer.loss()
        everything = list(balancer.importance.values())
        short = {"input_ids": whole["input_ids"][:, :4]}
        model(**short)
        balancer.loss()
        start = list(balancer.importance.values())
    length = whole["input_ids"].shape[1]
    for late, x, early in zip(found, everything, start, strict=True):
        torch.testing.assert_close(late, (x * length - early * 4) / (length - 4))


def test_a_schedule_takes_the_step() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model, weight=schedules.linear_warmup(1.0, 4)) as balancer:
        losses = []
        for step in (0, 2, 4):
            model(**whole)
            losses.append(balancer.loss(step=step).item())
        assert losses[0] == 0.0
        assert losses[1] == pytest.approx(losses[2] / 2)
        model(**whole)
        with pytest.raises(ValueError, match="step: got None, expected a number"):
            balancer.loss()


def test_checkpointed_blocks_are_recorded_once() -> None:
    for side in (None, "right"):
        model, whole = training(), batch(side)
        with HeadBalancer(model) as balancer:
            want = alone(model, balancer, whole)
            model.activation_checkpointing_enable({"use_reentrant": False})
            got = alone(model, balancer, whole)
            assert_same(got, want, balancer.mean_cv)
            assert not balancer._records
            assert balancer._pass is None


def test_reentrant_checkpointing_is_refused() -> None:
    model, whole = training(), batch(None)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with (
        HeadBalancer(model),
        pytest.raises(ValueError, match=r"layers.0.self_attn: .* use_reentrant=False"),
    ):
        model(**whole)


def test_a_model_inside_a_checkpointed_part_is_recorded_once() -> None:
    model, whole = training(), batch()

    def squares(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits.square()

    with HeadBalancer(model) as balancer:
        want = alone(model, balancer, whole)
        checkpoint(squares, *whole.values(), use_reentrant=False)
        balancer.loss().backward()
        assert_same(gradients(model), want, balancer.mean_cv)
        assert not balancer._records


def test_reentrant_checkpointing_of_all_is_refused() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        weight = torch.ones((), requires_grad=True)
        checkpoint(lambda x: model(**whole).logits * x, weight, use_reentrant=True)
        with pytest.raises(ValueError, match=r"without grad alone, .* use_reentrant=False"):
            balancer.loss()


def test_nothing_is_recorded_in_eval_mode() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        model.eval()
        model(**whole)
        with pytest.raises(ValueError, match=r"nothing recorded, .* in training mode"):
            balancer.loss()
        model.train()
        model(**whole)
        balancer.loss()


def test_without_grad_the_loss_is_a_number() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        model(**whole)
        want = balancer.loss()
        with torch.no_grad():
            model(**whole)
            got = balancer.loss()
        assert want.requires_grad
        assert not got.requires_grad
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        model.requires_grad_(False)
        model(**whole)
        assert not balancer.loss().requires_grad


def test_a_failed_pass_leaves_nothing_behind() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        want = alone(model, balancer, whole)

        def fail(*_: object) -> None:
            raise KeyError("on purpose")

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        for broken in (lambda: model(**whole), lambda: balancer.measure([whole])):
            with pytest.raises(KeyError, match="on purpose"):
                broken()
            assert balancer._pass is None
            assert not balancer._records
            assert not balancer._measuring
        handle.remove()
        assert_same(alone(model, balancer, whole), want, balancer.mean_cv)


def test_layers_that_do_not_run_have_no_part() -> None:
    model, whole = training(num_hidden_layers=3), batch(None)
    layer = model.model.layers[1]
    with HeadBalancer(model, skip_layers=1) as balancer:
        model(**whole)
        balancer.loss()
        layer.forward = lambda hidden_states, **_: hidden_states
        model(**whole)
        loss = balancer.loss()
        assert list(balancer.importance) == [f"model.layers.{i}.self_attn" for i in (0, 2)]
        want = head_balance_loss(list(balancer.importance.values())[1:])
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        balancer.measure([whole])
        del layer.forward
        model(**whole)
        with pytest.raises(ValueError, match=r"measure: has not seen \['model.layers.1.self_attn'"):
            balancer.loss()


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_detaching_leaves_the_model_as_it_was(name: str) -> None:
    model = training(name)
    before = [dict(module.__dict__) for module in model.modules()]
    with HeadBalancer(model):
        assert all(PROBE in module.__dict__ for module in model.modules())
    for module, want in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == want.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_the_model_is_not_attached(duplicate: Callable[[Any], Any]) -> None:
    model, whole = training(), batch()
    with HeadBalancer(model, weight=lambda step: 1.0) as balancer:
        twin = duplicate(model)
        twin(**whole)
        assert not balancer._records
        model(**whole)
        balancer.loss(step=0)
        want = model(**whole).logits
    assert torch.equal(twin(**whole).logits, want)
    with HeadBalancer(twin) as other:
        twin(**whole)
        other.loss()


def test_a_report_of_an_attached_model_leaves_it_attached() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        head_report(model.eval(), whole, ablation=False)
        model.train()
        model(**whole)
        balancer.loss()


def test_all_gates_closed_cost_nothing() -> None:
    model, whole = training(), batch()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(1e4)
    with HeadBalancer(model) as balancer:
        got = alone(model, balancer, whole)
    assert balancer.mean_gate == 0.0
    assert balancer.mean_cv == 0.0
    assert not any(x.any() for x in got.values())


def test_a_nan_in_a_weight_shows_in_the_loss() -> None:
    model, whole = training(), batch()
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks[0] = float("nan")
    with HeadBalancer(model, shared=1) as balancer:
        model(**whole)
        assert balancer.loss().isnan()


def test_compiled_models_are_refused() -> None:
    model = training("llama")
    with pytest.raises(ValueError, match=r"is compiled, expected what torch.compile was given"):
        HeadBalancer(torch.compile(model, backend="eager")).attach()
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"model.layers.0 is compiled"):
        HeadBalancer(model).attach()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": -0.1}, "weight: got -0.1"),
        ({"shared": -1}, "shared: got -1"),
        ({"correction": 2}, "correction: got 2"),
        ({"skip_first": -1}, "skip_first: got -1"),
        ({"accumulation": "running"}, "accumulation: got 'running', expected 'measured' or"),
        ({"model": nn.DataParallel(nn.Linear(1, 1))}, "model: got nn.DataParallel"),
    ],
    ids=str,
)
def test_says_which_argument_is_wrong(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"model": nn.Linear(1, 1)} | change
    with pytest.raises(ValueError, match=says):
        HeadBalancer(**arguments)


def test_says_what_does_not_fit_the_model() -> None:
    model, whole = training(), batch()
    for options, says in (
        ({"skip_layers": 2}, "skip_layers: got 2, expected fewer than 2 layers"),
        ({"shared": 4}, "shared: got 4, expected fewer than the 4 heads"),
        ({"shared_heads": [[0]]}, "shared_heads: got 1 layers, expected 2"),
    ):
        with HeadBalancer(model, **options) as balancer:
            model(**whole)
            with pytest.raises(ValueError, match=says):
                balancer.loss()
            with pytest.raises(ValueError, match="nothing recorded"):
                balancer.loss()


def test_says_what_does_not_fit_the_step() -> None:
    model, whole = training(), batch()
    with HeadBalancer(model) as balancer:
        model(**whole)
        with pytest.raises(ValueError, match=r"micro_batches: got 2 without measure\(\)"):
            balancer.loss(micro_batches=2)
        with pytest.raises(ValueError, match="micro_batches: got 0, expected 1 or more"):
            balancer.loss(micro_batches=0)
        balancer.measure([whole, whole])
        model(**whole)
        with pytest.raises(ValueError, match="micro_batches: got 1, expected the 2 that measure"):
            balancer.loss()
        with pytest.raises(ValueError, match="nothing recorded"):
            balancer.measure([])
        with pytest.raises(ValueError, match="attached already"):
            balancer.attach()
        with pytest.raises(ValueError, match="watched by somebody else already"):
            HeadBalancer(model).attach()
