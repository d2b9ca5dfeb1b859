"""The head-balance loss: its formula, its gradient, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import (
    head_balance_loss,
    head_variation,
    most_important,
    reference,
    schedules,
    sink_attention,
)

from .cases import KINDS, Case, split
from .tolerances import U_FP32, relative_error

LAYERS, HEADS = 4, 8


def importances(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(LAYERS, HEADS, dtype=dtype) + 0.05


def closed_form_gradient(x: Tensor, weight: float) -> Tensor:
    """weight n d(CV^2)/dx_h = 2 weight [(x_h - mean) / mean^2 - Var / mean^3], variance over n."""
    mean = x.mean()
    return 2 * weight * ((x - mean) / mean**2 - x.var(correction=0) / mean**3)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("shared", [0, 1, HEADS - 2])
def test_the_loss_is_n_times_the_squared_cv_of_the_balanced_heads(
    shared: int, correction: int
) -> None:
    x = importances()
    want = 0.0
    for row in x:
        rest = row.sort().values[: HEADS - shared]
        want += 0.3 * len(rest) * (rest.std(correction=correction) / rest.mean()).item() ** 2
    got = head_balance_loss(x, weight=0.3, shared=shared, correction=correction)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_the_gradient_is_the_closed_form_of_the_paper() -> None:
    x = importances().requires_grad_()
    head_balance_loss(x, weight=0.7).backward()
    assert x.grad is not None
    for row, got in zip(x.detach(), x.grad, strict=True):
        torch.testing.assert_close(got, closed_form_gradient(row, 0.7), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": 3},
        {"correction": 1},
        {"skip_layers": 2, "shared": 1, "correction": 1},
        {"shared_heads": [[0, 5], [], [1], [7, 2, 3]]},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    x = importances().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head_balance_loss(x, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: head_balance_loss(x, **options), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 3, 7, 8, 13, 29])
def test_equal_importances_cost_exactly_nothing(heads: int, dtype: torch.dtype) -> None:
    """The rounded mean of equals may differ from them."""
    values = torch.cat((torch.rand(60, dtype=dtype), torch.tensor([1e-30, 0.1, 1.0], dtype=dtype)))
    x = values[:, None].expand(-1, heads).clone().requires_grad_()
    for correction in (0, 1):
        loss = head_balance_loss(x, correction=correction)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0.0
        assert not gradient.any()


@pytest.mark.parametrize("row", [[0.0] * 4, [1e-45] * 4, [0.5, -0.5, 0.25, -0.25]], ids=str)
def test_a_mean_of_zero_costs_nothing_and_has_no_gradient(row: list[float]) -> None:
    x = torch.tensor([row], requires_grad=True)
    loss = head_balance_loss(x)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-100, 0.5, 1024.0])
def test_a_factor_on_the_importances_changes_nothing(factor: float) -> None:
    """The square of a mean of 2^-100 would underflow in fp32."""
    x = importances(torch.float32)
    assert torch.equal(head_balance_loss(x * factor), head_balance_loss(x))


def test_layers_may_differ_in_their_number_of_heads() -> None:
    x = [torch.rand(h, dtype=torch.float64) for h in (1, 3, 8)]
    want = sum(head_balance_loss(row[None]) for row in x)
    torch.testing.assert_close(head_balance_loss(x), want)
    assert head_balance_loss(list(importances())[:2]).item() > 0.0


def test_a_list_of_layers_is_worth_a_matrix() -> None:
    x = importances()
    for options in ({}, {"shared": 2, "skip_layers": 1}):
        assert torch.equal(head_balance_loss(x, **options), head_balance_loss(list(x), **options))


def test_a_layer_of_one_head_is_balanced() -> None:
    for correction in (0, 1):
        x = torch.rand(3, 1, requires_grad=True)
        loss = head_balance_loss(x, correction=correction)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0.0
        assert not gradient.any()


def test_skipped_layers_have_no_part() -> None:
    x = importances().requires_grad_()
    loss = head_balance_loss(x, skip_layers=3)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(loss, head_balance_loss(x[3:]))
    assert not gradient[:3].any()
    assert gradient[3:].all()


def test_shared_heads_have_no_part_and_may_be_frozen() -> None:
    x = importances()
    sets = most_important(x, 2)
    moved = x[:1].clone()
    moved[0, sets[0]] = 1e-3  # no longer the most important ones
    want = head_balance_loss(moved[:, ~sets[0]])
    got = head_balance_loss(moved, shared_heads=sets[:1])
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, head_balance_loss(moved, shared=2))
    for form in (torch.stack(sets), [mask.nonzero().flatten().tolist() for mask in sets]):
        assert torch.equal(head_balance_loss(x, shared_heads=form), head_balance_loss(x, shared=2))


def test_the_most_important_heads_are_the_first_of_equals() -> None:
    x = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])
    found = [mask.tolist() for mask in most_important(x, 2)]
    assert found == [[True, True, False, False], [True, True, False, False]]
    assert not any(mask.any() for mask in most_important(x, 0))
    assert all(mask.all() for mask in most_important(x, 4))


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_a_nan_is_never_hidden(shared: int) -> None:
    x = torch.tensor([[0.5, float("nan"), 0.2, 0.7, 0.1], [0.5, 0.4, 0.2, 0.7, 0.1]])
    assert head_balance_loss(x, shared=shared).isnan()


def test_strides_and_frozen_inputs_do_not_matter() -> None:
    x = importances()
    padded = torch.full((HEADS, 2 * LAYERS), float("nan"), dtype=x.dtype)
    padded[:, ::2] = x.T
    got = head_balance_loss(padded[:, ::2].T)
    assert torch.equal(got, head_balance_loss(x))
    assert not got.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_loss_to_the_weights_as_autograd_through_the_reference(kind: str) -> None:
    """One scalar per head is all that reaches the kernel."""
    case = Case(
        kind=kind, batch=2, key_heads=2, ratio=2, queries=70, keys=70, padding="start",
        some_tokens=True,
    )  # fmt: skip
    tensors, options = case.make()
    names = [name for name in ("sinks", "gate") if name in options]
    gradients = []
    for call, dtype in ((sink_attention, torch.float32), (reference.sink_attention, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors[:2]]
        extra = {name: options[name].detach().to(dtype).requires_grad_() for name in names}
        _, aux = split(call(*leaves, tensors[2].to(dtype), **options | extra))
        assert aux is not None
        loss = head_balance_loss(aux.importance[None], weight=1.0, shared=1)
        wanted = [*leaves, *extra.values()] if kind in ("sink", "vanilla") else extra.values()
        gradients.append(torch.autograd.grad(loss, list(wanted)))
    # The kernels promise 2e-6 of a gradient. The scalar is a difference of importances, each of
    # which is known to 8 u: of a small variation, that is more.
    allowed = 2e-6 + 8 * U_FP32 / head_variation(aux.importance[None]).item()
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want) <= allowed


def test_variation_is_what_numpy_says() -> None:
    x = importances()
    want = x.numpy().std(1) / x.numpy().mean(1)
    torch.testing.assert_close(head_variation(x), torch.from_numpy(want))
    assert head_variation(torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_schedules() -> None:
    assert [schedules.constant(0.1)(step) for step in (0, 10**6)] == [0.1, 0.1]
    warmup = schedules.linear_warmup(0.4, 4)
    assert [warmup(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    cosine = schedules.cosine(0.4, 12, warmup=4, final=0.2)
    want = [0, 0.2, 0.4, 0.2 + 0.1 * (1 + math.sqrt(0.5)), 0.3, 0.2, 0.2]
    assert [cosine(step) for step in (0, 2, 4, 6, 8, 12, 99)] == pytest.approx(want)
    for bad in (
        lambda: schedules.linear_warmup(0.1, 0),
        lambda: schedules.cosine(0.1, 4, warmup=4),
        lambda: schedules.cosine(0.1, 4, warmup=-1),
    ):
        with pytest.raises(ValueError, match=r"steps|warmup"):
            bad()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"importances": torch.rand(4)}, r"importances.ndim: got 1, expected 2"),
        ({"importances": []}, "importances: got no layer"),
        ({"importances": torch.rand(0, 4)}, "importances: got no layer"),
        ({"importances": torch.rand(2, 0)}, r"importances\[0\].shape: got \(0,\)"),
        ({"importances": [torch.rand(4), torch.rand(1, 4)]}, r"importances\[1\].shape"),
        ({"importances": torch.rand(2, 4).bfloat16()}, r"importances\[0\].dtype: got .*bfloat16"),
        ({"importances": torch.ones(2, 4).long()}, r"importances\[0\].dtype: got .*int64"),
        ({"importances": [torch.rand(4), torch.rand(4).double()]}, r"importances\[1\]: got .*64"),
        ({"weight": -1.0}, "weight: got -1.0"),
        ({"weight": float("nan")}, "weight: got nan"),
        ({"shared": 4}, "shared: got 4, expected fewer than the 4 heads of layer 0"),
        ({"shared": -1}, "shared: got -1, expected 0 or more"),
        ({"skip_layers": 2}, "skip_layers: got 2, expected fewer than 2 layers"),
        ({"skip_layers": -1}, "skip_layers: got -1"),
        ({"correction": 2}, "correction: got 2, expected 0 or 1"),
        ({"shared": 1, "shared_heads": [[0], [1]]}, "shared: got 1 beside shared_heads"),
        ({"shared_heads": [[0]]}, "shared_heads: got 1 layers, expected 2"),
        ({"shared_heads": [[0], [4]]}, r"shared_heads\[1\]: got head 4, expected 0 to 3"),
        ({"shared_heads": [[0], [0, 1, 2, 3]]}, r"shared_heads\[1\]: got every head"),
        ({"shared_heads": [[0], [True, False]]}, r"shared_heads\[1\]: got a list of torch.bool"),
        ({"shared_heads": [[0], [1.5]]}, r"shared_heads\[1\]: got a list of torch.float32"),
        ({"shared_heads": torch.zeros(2, 4)}, r"shared_heads\[0\].dtype: got .*float32"),
        ({"shared_heads": torch.zeros(2, 3).bool()}, r"shared_heads\[0\].shape: got \(3,\)"),
    ],
    ids=str,
)
def test_says_which_argument_is_wrong(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"importances": torch.rand(2, 4)} | change
    with pytest.raises(ValueError, match=says):
        head_balance_loss(arguments.pop("importances"), **arguments)


def test_importances_must_be_tensors() -> None:
    with pytest.raises(TypeError, match=r"importances\[0\]: got list, expected a tensor"):
        head_balance_loss([[0.5, 0.5]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="m: got 5, expected 0 to the 4 heads of layer 0"):
        most_important(torch.rand(2, 4), 5)
