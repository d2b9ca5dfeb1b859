"""Models are left as they were found, and what cannot be measured is refused by its name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernstone.sensitivity import (
    LayerHessian,
    fisher_diagonal,
    hutchinson_trace,
    layer_hessian,
    output_fisher,
)

from .sensitivity_cases import CLASSES, FEATURES, HIDDEN, loss, samples, small


def dressed() -> nn.Sequential:
    """A model with flags, gradients and a hook of its own, and a random part."""
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES))
    model.double().train()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.full_like(model[2].weight, 3.0)
    model[2].register_forward_hook(lambda *_: None)
    return model


def state_of(model: nn.Module) -> list[Any]:
    return [
        (
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            {name: id(p) for name, p in module._parameters.items()},
            [(p.requires_grad, p.tolist(), p.grad if p.grad is None else p.grad.tolist()) for p in
             module._parameters.values() if p is not None],
        )
        for module in model.modules()
    ]  # fmt: skip


def use(name: str, model: nn.Module, loss: Any = loss) -> Any:
    batches = [samples(4), samples(3)]
    if name == "fisher_diagonal":
        return fisher_diagonal(model, batches, loss)
    if name == "output_fisher":
        return output_fisher(model, ["0", "2"], batches, loss)
    return layer_hessian(model, ["0", "2"], [x for x, _ in batches], dtype=torch.float64)


FUNCTIONS = ("fisher_diagonal", "output_fisher", "layer_hessian")


@pytest.mark.parametrize("name", FUNCTIONS)
class TestModels:
    def test_are_left_as_they_were(self, name: str) -> None:
        model = dressed()
        before = state_of(model)
        use(name, model)
        assert state_of(model) == before

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_are_left_as_they_were_when_something_fails(
        self, name: str, error: type[BaseException]
    ) -> None:
        model = dressed()
        calls = []

        def failing(*_: Any) -> None:
            calls.append(0)
            if len(calls) > 1:
                raise error("stop")

        model[2].register_forward_hook(failing)
        before = state_of(model)
        failing()
        with pytest.raises(error, match="stop"):
            use(name, model)
        assert state_of(model) == before

    def test_are_used_without_their_random_parts(self, name: str) -> None:
        model = dressed()
        state = torch.get_rng_state()
        got, again = use(name, model), use(name, model)
        still = use(name, copy.deepcopy(model).eval())
        for key, value in got.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[key]))
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(still[key]))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    def test_are_used_where_gradients_are_off(self, name: str, off: Any) -> None:
        model = dressed()
        want = use(name, model)
        with off():
            got = use(name, model)
        for key, value in want.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(got[key]))

    def test_are_used_with_deterministic_algorithms(self, name: str) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            assert use(name, dressed())
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("measure", [fisher_diagonal, output_fisher])
class TestBadBatches:
    def call(self, measure: Any, batches: Any, loss: Any = loss) -> Any:
        names = {"modules": ["0"]} if measure is output_fisher else {}
        return measure(small(), batches=batches, loss=loss, **names)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "batches: got no sample"),
            ([samples(0)], "batches: got no sample"),
            ([samples(2), (3.0, None)], r"batches\[1\]: got no tensor with samples"),
            ([(torch.ones(2, 5).double(), torch.tensor(1))], r"batches\[0\]: got no tensor with"),
            ([(samples(3)[0], samples(2)[1])], r"batches\[0\]: got tensors of \[2, 3\] samples"),
        ],
    )
    def test_are_named(self, measure: Any, batches: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(measure, batches)

    def test_a_loss_for_each_logit_is_refused(self, measure: Any) -> None:
        with pytest.raises(ValueError, match=r"loss: got a torch.float64 tensor of shape \(1, 3\)"):
            self.call(measure, [samples(2)], lambda model, batch: model(batch[0]))
        with pytest.raises(ValueError, match=r"loss: got a torch.int64 tensor of shape \(\)"):
            self.call(measure, [samples(2)], lambda model, batch: model(batch[0]).argmax())
        with pytest.raises(TypeError, match="loss: got float, expected a tensor"):
            self.call(measure, [samples(2)], lambda model, batch: model(batch[0]).sum().item())

    def test_a_loss_without_a_graph_is_refused(self, measure: Any) -> None:
        def cut(model: nn.Module, batch: Any) -> Tensor:
            value: Tensor = model(batch[0]).sum().item() * torch.ones(())
            return value

        with pytest.raises(ValueError, match="loss: got a tensor without a graph"):
            self.call(measure, [samples(2)], cut)


ONE = torch.ones(3, dtype=torch.float64, requires_grad=True)
X = samples(2)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fisher_diagonal(small(), [samples(2)], loss, parameters=["0.wieght"]),
            ValueError,
            "parameters: got '0.wieght', expected a name such as 0.weight",
        ),
        (
            lambda: fisher_diagonal(small(), [samples(2)], loss, parameters="0.weight"),
            TypeError,
            "parameters: got a string",
        ),
        (
            lambda: fisher_diagonal(small(), [samples(2)], loss, parameters=[]),
            ValueError,
            "parameters: got none",
        ),
        (
            lambda: fisher_diagonal(small(), [samples(2)], loss, chunk=0),
            ValueError,
            "chunk: got 0, expected 1 or more",
        ),
        (
            lambda: output_fisher(small(), ["7"], [samples(2)], loss),
            ValueError,
            "modules: got '7', expected a name such as",
        ),
        (
            lambda: output_fisher(small(), "0", [samples(2)], loss),
            TypeError,
            "modules: got a string",
        ),
        (lambda: hutchinson_trace(ONE.sum(), [], samples=2, seed=0), ValueError, "parameters: got"),
        (
            lambda: hutchinson_trace(ONE.sum(), ONE, samples=2, seed=0),
            TypeError,
            "parameters: got a tensor, expected a sequence of them",
        ),
        (
            lambda: hutchinson_trace(ONE.sum(), [ONE, 3], samples=2, seed=0),
            TypeError,
            r"parameters\[1\]: got int, expected a tensor",
        ),
        (
            lambda: hutchinson_trace(ONE.sum(), [ONE, X], samples=2, seed=0),
            ValueError,
            r"parameters\[1\]: got a tensor that needs no gradient",
        ),
        (
            lambda: hutchinson_trace(ONE.sum(), [ONE], samples=1, seed=0),
            ValueError,
            "samples: got 1, expected 2 or more",
        ),
        (
            lambda: hutchinson_trace(ONE * 2, [ONE], samples=2, seed=0),
            ValueError,
            r"loss: got a torch.float64 tensor of shape \(3,\), expected a scalar",
        ),
        (lambda: hutchinson_trace(3.0, [ONE], samples=2, seed=0), TypeError, "loss: got float"),
        (
            lambda: hutchinson_trace(X.sum(), [ONE], samples=2, seed=0),
            ValueError,
            "loss: got a tensor without a graph",
        ),
        (lambda: LayerHessian(0), ValueError, "width: got 0, expected 1 or more"),
        (lambda: LayerHessian(3, dtype=torch.float16), ValueError, "dtype: got torch.float16"),
        (lambda: LayerHessian(3).hessian(), ValueError, "rows: got none"),
        (
            lambda: LayerHessian(3).add(torch.ones(2, 4)),
            ValueError,
            r"x: got a torch.float32 tensor of shape \(2, 4\), expected floats \[..., 3\]",
        ),
        (lambda: LayerHessian(3).add(torch.ones(3).int()), ValueError, "x: got a torch.int32"),
        (lambda: LayerHessian(1).add(torch.ones(())), ValueError, r"x: got .* shape \(\)"),
        (lambda: LayerHessian(3).add([1.0, 2.0, 3.0]), TypeError, "x: got list, expected a tensor"),
        (
            lambda: layer_hessian(small(), ["1"], [X]),
            TypeError,
            "modules: '1' is a Tanh, expected a torch.nn.Linear",
        ),
        (lambda: layer_hessian(small(), ["0"], []), ValueError, "modules: nothing reached 0"),
        (lambda: layer_hessian(small(), ["0"], [X], dtype=torch.half), ValueError, "dtype: got"),
    ],
)
def test_names_what_is_wrong(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("output", [None, [], 3.0, (torch.ones(2, dtype=torch.int64),)], ids=str)
def test_a_module_that_gives_no_floats_is_named(output: Any) -> None:
    class Odd(nn.Module):
        def forward(self, _: Tensor) -> Any:
            return output

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.main = Odd(), small()

        def forward(self, x: Tensor) -> Tensor:
            self.odd(x)
            return self.main(x)

    with pytest.raises(TypeError, match=r"modules: 'odd' gives a .*, expected floats \[..., d\]"):
        output_fisher(Around(), ["odd"], [samples(2)], loss)
