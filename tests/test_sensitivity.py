"""Sensitivities against exact derivatives."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from quernstone.sensitivity import (
    LayerHessian,
    fisher_diagonal,
    hutchinson_trace,
    layer_hessian,
    output_fisher,
)

from .sensitivity_cases import CLASSES, FEATURES, HIDDEN, loss, samples, small

# Everything is in fp64 and a few thousand operations deep: u = 2^-53 times 1e3, and to spare.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def hessian(value: Callable[..., Tensor], argnums: Any = 0) -> Callable[..., Any]:
    return torch.func.jacrev(torch.func.jacrev(value, argnums), argnums)


def by_backward(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient, one ordinary backward pass a sample."""
    model = copy.deepcopy(model).eval().requires_grad_()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one, label in zip(x, y, strict=True):
        model.zero_grad()
        cross_entropy(model(one[None]), label[None]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2
    return {name: value / len(x) for name, value in total.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


class Looks(nn.Module):
    """A layer that looks at its values, which vmap does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return 2 * out if out.sum().item() > 0 else out


def all_labels(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every sample with every label, and the probability that the model gives the label."""
    weights = model(x).softmax(-1).detach()
    labels = torch.arange(CLASSES).expand(len(x), CLASSES).reshape(-1)
    return x.repeat_interleave(CLASSES, 0), labels, weights.reshape(-1)


def expected(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Its squared gradients, summed over the labels, are the expectation over them."""
    x, y, weight = batch
    return weight.sqrt().reshape(()) * cross_entropy(model(x), y)


class TestFisherDiagonal:
    @pytest.mark.parametrize("make", [small, Looks])
    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_is_the_mean_of_the_squared_gradients_of_single_samples(
        self, make: Callable[[], nn.Module], chunk: int
    ) -> None:
        model, (x, y) = make(), samples(13)
        batches = [(x[:1], y[:1]), (x[1:9], y[1:9]), (x[9:], y[9:])]
        got = fisher_diagonal(model, batches, loss, chunk=chunk)
        assert_same(got, by_backward(model, x, y))

    def test_is_not_the_square_of_the_mean(self) -> None:
        model, (x, y) = small(), samples(13)
        (got,) = fisher_diagonal(model, [(x, y)], loss, parameters=["2.weight"]).values()
        (mean,) = torch.autograd.grad(loss(model, (x, y)), [model[2].weight])
        assert (got > mean.square()).all()
        assert got.sum() > 2 * mean.square().sum()

    def test_is_the_diagonal_of_the_hessian_for_labels_of_the_model_and_linear_logits(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, CLASSES).double()
        x, y = samples(7)

        def total(weight: Tensor, bias: Tensor) -> Tensor:
            return cross_entropy(x @ weight.T + bias, y)

        blocks = hessian(total, (0, 1))(model.weight, model.bias)
        got = fisher_diagonal(model, [all_labels(model, x)], expected)
        for at, (name, value) in enumerate(got.items()):
            size = value.numel()
            want = blocks[at][at].detach().reshape(size, size).diagonal()
            torch.testing.assert_close(CLASSES * value.reshape(-1), want, msg=name, **CLOSE)

    def test_is_the_diagonal_of_the_gauss_newton_matrix_for_labels_of_the_model(self) -> None:
        model, (x, _) = small(), samples(7)
        got = fisher_diagonal(model, [all_labels(model, x)], expected)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        for name, value in got.items():
            want = torch.zeros(value.numel(), dtype=torch.float64)
            for one in x:

                def logits(p: Tensor, name: str = name, one: Tensor = one) -> Tensor:
                    return torch.func.functional_call(model, parameters | {name: p}, (one,))

                jacobian = torch.func.jacrev(logits)(parameters[name]).reshape(CLASSES, -1)
                p = logits(parameters[name]).softmax(-1)
                middle = p.diag() - torch.outer(p, p)
                want += (jacobian.T @ middle @ jacobian).diagonal() / len(x)
            torch.testing.assert_close(CLASSES * value.reshape(-1), want, msg=name, **CLOSE)

    def test_samples_run_side_by_side_where_the_model_allows_it(self) -> None:
        calls = []

        def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            calls.append(len(batch[0]))
            return cross_entropy(model(batch[0]), batch[1], reduction="none")

        fisher_diagonal(small(), [samples(12)], counted, chunk=4)
        assert calls == [1, 1, 1]
        calls.clear()
        fisher_diagonal(Looks(), [samples(12)], counted, chunk=4)
        assert calls == [1] * 13

    def test_only_the_chosen_parameters_are_returned_under_the_chosen_names(self) -> None:
        model, (x, y) = small(), samples(5)
        want = by_backward(model, x, y)
        got = fisher_diagonal(model, [(x, y)], loss, parameters=("2.bias", "0.weight"))
        assert_same(got, {name: want[name] for name in ("2.bias", "0.weight")})

    def test_frozen_parameters_have_a_sensitivity_too(self) -> None:
        for make in (small, Looks):
            model, (x, y) = make(), samples(5)
            want = by_backward(model, x, y)
            assert_same(fisher_diagonal(model.requires_grad_(False), [(x, y)], loss), want)

    def test_a_parameter_in_two_places_has_the_gradient_of_both(self) -> None:
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(5, 5)).double()
        model[2].weight = model[0].weight
        x, y = samples(6)
        want = by_backward(model, x, y)
        assert_same(fisher_diagonal(model, [(x, y)], loss), want)
        got = fisher_diagonal(model, [(x, y)], loss, parameters=["2.weight"])
        assert_same(got, {"2.weight": want["0.weight"]})

    def test_a_parameter_that_the_loss_does_not_see_has_none(self) -> None:
        for make in (small, Looks):
            model = make()
            model.register_parameter("unseen", nn.Parameter(torch.ones(3, dtype=torch.float64)))
            got = fisher_diagonal(model, [samples(3)], loss, parameters=["unseen"])
            assert torch.equal(got["unseen"], torch.zeros(3, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_is_added_up_in_fp32_at_least(self, dtype: torch.dtype) -> None:
        """1 + 2^-9 ten times is no number of bf16, nor are partial sums."""
        model = nn.Linear(1, 1, bias=False).to(dtype)
        x = torch.full((10, 1), 1 + 2.0**-7).to(dtype)
        got = fisher_diagonal(model, [x], lambda m, b: m(b).sum(), chunk=1)["weight"]
        assert got.dtype is torch.float32
        torch.testing.assert_close(got.item(), (1 + 2.0**-7) ** 2, rtol=1e-6, atol=0.0)

    def test_batches_are_put_together_as_they_came(self) -> None:
        class Pair(NamedTuple):
            x: Tensor
            label: Tensor

        model, (x, y) = small(), samples(6)

        def nested(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            assert batch["scale"] == 2.0
            assert batch["none"] is None
            assert isinstance(batch["list"], list)
            pair = batch["list"][0]
            return cross_entropy(model(pair.x), pair.label) * batch["scale"] / 2

        batch = {"scale": 2.0, "list": [Pair(x, y)], "none": None}
        assert_same(fisher_diagonal(model, [batch], nested), by_backward(model, x, y))

    def test_batches_are_gone_through_once(self) -> None:
        model, (x, y) = small(), samples(6)
        batches: Iterator[Any] = iter([(x[:2], y[:2]), (x[2:], y[2:])])
        assert_same(fisher_diagonal(model, batches, loss), by_backward(model, x, y))


class Block(nn.Module):
    """What a mixture-of-experts block gives: its output and the logits of its router."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(FEATURES, HIDDEN), kind

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.kind == "named":
            return Named(y, x)
        return {"tensor": y, "tuple": (y, x), "list": [y, x]}[self.kind]


class Named(NamedTuple):
    output: Tensor
    logits: Tensor


class Sequences(nn.Module):
    """Embeds tokens, and overwrites what the watched block gives."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.block, self.head = Block(kind), nn.Linear(HIDDEN, CLASSES)
        self.kind = kind

    def middle(self, y: Tensor) -> Tensor:
        return self.head((y * y).cumsum(-2))

    def forward(self, x: Tensor) -> Tensor:
        got = self.block(x)
        if self.kind == "named":
            assert got.logits is x
        y = got if self.kind == "tensor" else got[0]
        square = y.clone()
        y.mul_(square)
        return self.head(y.cumsum(-2))


def sequence_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")


def sequences(count: int, tokens: int) -> tuple[Tensor, Tensor]:
    x, y = samples(count * tokens)
    return x.reshape(count, tokens, FEATURES), y.reshape(count, tokens)


class TestOutputFisher:
    @pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "named"])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_is_the_mean_over_tokens_of_the_squared_gradient(self, kind: str, frozen: bool) -> None:
        torch.manual_seed(0)
        model = Sequences(kind).double().requires_grad_(not frozen)
        long, short = sequences(3, 7), sequences(2, 4)
        total, tokens = 0.0, 0
        for x, y in [*zip(*long, strict=True), *zip(*short, strict=True)]:

            def tail(given: Tensor, y: Tensor = y) -> Tensor:
                return cross_entropy(model.middle(given), y, reduction="sum")

            gradient = torch.func.grad(tail)(model.block.linear(x).detach())
            total += gradient.square().sum().item()
            tokens += len(x)
        got = output_fisher(model, ["block"], [long, short], sequence_loss)
        assert got == {"block": pytest.approx(total / tokens, rel=1e-12)}

    def test_is_the_trace_of_the_hessian_for_labels_of_the_model(self) -> None:
        model, (x, _) = small(), samples(7)

        def tail(hidden: Tensor) -> Tensor:
            return cross_entropy(model[2](hidden), torch.zeros((), dtype=torch.int64))

        hidden = model[:2](x).detach()
        traces = [hessian(tail)(one).diagonal().sum().item() for one in hidden]
        got = output_fisher(model, ["1"], [all_labels(model, x)], expected)
        assert CLASSES * got["1"] == pytest.approx(sum(traces) / len(x), rel=1e-12)

    def test_foretells_the_rise_of_the_loss(self) -> None:
        """With a Hessian that does not depend on the labels the second order is exact."""
        model, (x, _) = small(), samples(7)
        fisher = CLASSES * output_fisher(model, ["1"], [all_labels(model, x)], expected)["1"]
        hidden = model[:2](x).detach()
        size = 1e-3
        steps = torch.eye(HIDDEN, dtype=torch.float64) * size
        rise = 0.0
        for step in (*steps, *-steps):
            p, q = (model[2](h).log_softmax(-1) for h in (hidden, hidden + step))
            rise += (p.exp() * (p - q)).sum(-1).mean().item() / (2 * HIDDEN)
        assert rise == pytest.approx(fisher * size**2 / (2 * HIDDEN), rel=1e-3)

    def test_a_module_that_runs_twice_counts_its_tokens_twice(self) -> None:
        torch.manual_seed(0)
        inner = nn.Linear(FEATURES, FEATURES).double()
        model = nn.Sequential(inner, nn.Tanh(), inner)
        x, y = samples(4)
        first, last = nn.Sequential(inner, nn.Tanh(), copy.deepcopy(inner)), ("0", "2")
        apart = output_fisher(first, last, [(x, y)], loss)
        got = output_fisher(model, ["0"], [(x, y)], loss)
        assert got["0"] == pytest.approx((apart["0"] + apart["2"]) / 2, rel=1e-12)

    def test_watching_changes_nothing_and_modules_do_not_disturb_each_other(self) -> None:
        model, batch = small(), samples(6)
        seen = []

        def watched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(loss(model, batch))
            return seen[-1]

        together = output_fisher(model, ["2", "0", "1"], [batch], watched)
        assert list(together) == ["2", "0", "1"]
        for name in together:
            assert output_fisher(model, [name], [batch], loss)[name] == together[name]
        want = [loss(model, (x[None], y[None])) for x, y in zip(*batch, strict=True)]
        assert torch.equal(torch.stack(seen), torch.stack(want))

    def test_a_module_that_the_loss_does_not_see_has_none(self) -> None:
        class Spy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.main, self.idle, self.spy = small(), nn.Identity(), nn.Linear(5, 2).double()

            def forward(self, x: Tensor) -> Tensor:
                self.spy(x)
                return self.main(x)

        got = output_fisher(Spy(), ["spy", "main"], [samples(3)], loss)
        assert got["spy"] == 0.0 < got["main"]
        with pytest.raises(ValueError, match="modules: nothing reached idle; leave them out"):
            output_fisher(Spy(), ["main", "idle"], [samples(3)], loss)


class TestHutchinsonTrace:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_diagonal_hessian_is_exact(self, seed: int) -> None:
        x = torch.randn(9, dtype=torch.float64, requires_grad=True)
        curvature = torch.arange(9, dtype=torch.float64)
        got = hutchinson_trace((curvature * x**2).sum() / 2, [x], samples=2, seed=seed)
        assert got == (36.0, 0.0)

    def test_estimates_and_their_spread_are_those_of_the_theory(self) -> None:
        generator = torch.Generator().manual_seed(3)
        a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        matrix = a + a.mT
        x = torch.ones(8, dtype=torch.float64, requires_grad=True)
        count = 1000
        got = hutchinson_trace(x @ matrix @ x / 2, [x], samples=count, seed=0)
        off = matrix - matrix.diagonal().diag()
        want = math.sqrt(2 * off.square().sum().item() / count)
        # A standard deviation of n samples is off by sqrt(kurtosis / 4 n), 4 % for one of 6.
        assert got.standard_error == pytest.approx(want, rel=0.16)
        assert abs(got.value - matrix.trace().item()) < 4 * want

    @pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (2,), (3, 0)])
    def test_is_the_trace_of_the_block_of_the_chosen_parameters(
        self, chosen: tuple[int, ...]
    ) -> None:
        model, batch = small(), samples(11)
        named = {name: p.detach() for name, p in model.named_parameters()}
        names = [list(named)[at] for at in chosen]

        def value(*parts: Tensor) -> Tensor:
            changed = named | dict(zip(names, parts, strict=True))
            out = torch.func.functional_call(model, changed, (batch[0],))
            return cross_entropy(out, batch[1])

        places = tuple(range(len(names)))
        blocks = hessian(value, places)(*(named[name] for name in names))
        want = 0.0
        for at, name in enumerate(names):
            size = named[name].numel()
            want += blocks[at][at].reshape(size, size).trace().item()
        parameters = list(model.parameters())
        got = hutchinson_trace(
            loss(model, batch), [parameters[at] for at in chosen], samples=60, seed=1
        )
        assert abs(got.value - want) < 4 * got.standard_error
        assert got.standard_error < 0.3 * want

    def test_what_has_no_curvature_adds_nothing(self) -> None:
        x, y, z = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
        assert hutchinson_trace(x.sum(), [x], samples=2, seed=0) == (0.0, 0.0)
        got = hutchinson_trace((x**2).sum() + 3 * y.sum(), [x, y, z], samples=3, seed=0)
        assert got == (6.0, 0.0)

    def test_the_seed_alone_decides(self) -> None:
        model, batch = small(), samples(5)
        state = torch.get_rng_state()
        value = loss(model, batch)
        first, again, other = (
            hutchinson_trace(value, model.parameters(), samples=3, seed=s) for s in (7, 7, 8)
        )
        assert first == again != other
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_graph_of_the_loss_is_kept_and_no_gradient_is_written(self) -> None:
        model = small()
        value = loss(model, samples(5))
        hutchinson_trace(value, model.parameters(), samples=2, seed=0)
        assert all(p.grad is None for p in model.parameters())
        value.backward()

    def test_works_where_gradients_are_off(self) -> None:
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        value = (x**3).sum()
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert hutchinson_trace(value, [x], samples=2, seed=0) == (18.0, 0.0)


class TestLayerHessian:
    def test_is_the_hessian_of_the_squared_error_of_a_row(self) -> None:
        x, target = samples(9)[0], torch.randn(9, dtype=torch.float64)
        total = LayerHessian(FEATURES, dtype=torch.float64)
        total.add(x)
        want = hessian(lambda w: (x @ w - target).square().mean())(torch.ones(5).double())
        torch.testing.assert_close(total.hessian(), want, **CLOSE)

    @pytest.mark.parametrize("width", [1, 3, 300])
    @pytest.mark.parametrize("rows", [1, 255, 256, 257, 301, 770])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_every_row_counts_once_within_the_rounding_of_the_sum(
        self, width: int, rows: int, dtype: torch.dtype
    ) -> None:
        x = torch.randn(rows, width)
        total = LayerHessian(width, dtype=dtype)
        for part in (x[:1], x[1:1], x[1:]):
            total.add(part)
        assert total.rows == rows
        exact = x.double()
        want = 2 / rows * exact.mT @ exact
        # A sum of n products is off by n u times the sum of their sizes; two more for the mean.
        size = 2 / rows * exact.abs().mT @ exact.abs()
        error = (total.hessian().double() - want).abs()
        unit = 2.0**-24 if dtype is torch.float32 else 2.0**-53
        assert (error <= 2 * (rows + 3) * unit * size).all()
        assert total.hessian().dtype is dtype

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_inputs_of_any_axes_layout_and_type_are_their_rows(self, dtype: torch.dtype) -> None:
        x = torch.randn(2, 3, 4, FEATURES).to(dtype)
        flat, other, strided = (LayerHessian(FEATURES) for _ in range(3))
        flat.add(x.reshape(-1, FEATURES))
        other.add(x)
        strided.add(x.transpose(0, 2).contiguous().transpose(0, 2))
        for row in (x[0, 0, 0], torch.zeros(0, FEATURES)):
            flat.add(row)
            other.add(row)
            strided.add(row)
        assert torch.equal(flat.hessian(), other.hessian())
        assert torch.equal(flat.hessian(), strided.hessian())

    @pytest.mark.parametrize("width", [5, 17, 67])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_is_symmetric_to_the_last_bit(self, width: int, dtype: torch.dtype) -> None:
        """A matrix product of x^T and x need not be."""
        total = LayerHessian(width, dtype=dtype)
        total.add(torch.randn(301, width, dtype=dtype))
        assert torch.equal(total.hessian(), total.hessian().mT)

    def test_holds_no_more_than_blocks_of_the_inputs(self) -> None:
        class Largest(TorchDispatchMode):
            bytes = 0

            def __torch_dispatch__(
                self, call: Any, _: Any, args: Any = (), more: Any = None
            ) -> Any:
                result = call(*args, **(more or {}))
                if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != own:
                    self.bytes = max(self.bytes, result.nbytes)
                return result

        x, total = torch.randn(4000, 8, dtype=torch.bfloat16), LayerHessian(8, dtype=torch.float64)
        own = x.untyped_storage().data_ptr()
        with Largest() as largest:
            total.add(x)
        assert largest.bytes == 256 * 8 * 8

    def test_a_model_gives_its_layers_their_inputs(self) -> None:
        model = small()
        x = samples(12)[0].reshape(3, 4, FEATURES)
        hidden = model[:2](x).detach()
        for batches in ([x], [x[:1], x[1:]], [(x,)], [[x[:2]], x[2:]], [{"input": x}]):
            got = layer_hessian(model, ["2", "0"], batches, dtype=torch.float64)
            assert list(got) == ["2", "0"]
            for name, inputs in (("0", x), ("2", hidden)):
                rows = inputs.reshape(-1, inputs.shape[-1])
                torch.testing.assert_close(got[name], 2 / 12 * rows.mT @ rows, **CLOSE)

    def test_a_layer_called_by_keyword_is_seen(self) -> None:
        class Keyword(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(FEATURES, 2).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(input=x)

        x, _ = samples(4)
        got = layer_hessian(Keyword(), ["linear"], [x], dtype=torch.float64)
        torch.testing.assert_close(got["linear"], x.mT @ x / 2, **CLOSE)
