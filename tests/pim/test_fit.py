"""Rounding at a price, and fine-tuning towards few ones, on models of a few dozen weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quernstone.pim import Codebook, fit, hamming_weights
from quernstone.quant import Rounding, Scheme, quantize


def costs(codebook: Codebook, position: Tensor) -> tuple[Tensor, Tensor]:
    """What each position pays for the code that it got, and the least that any would have cost."""
    most = (1 << (codebook.bits - 1)) - 1
    stored = np.arange(-most - 1, most + 1)
    ones = torch.from_numpy(hamming_weights(stored, codebook.bits)).double()
    codes = torch.from_numpy(stored - codebook.shift).double()
    all_costs = (codes - position.double()[:, None]).square() + codebook.price * ones
    got = codebook.round(position).long() + codebook.shift + most + 1
    return all_costs.gather(1, got[:, None])[:, 0], all_costs.min(1).values


@pytest.mark.parametrize(
    ("bits", "shift", "price"),
    [(8, 0, 0.0), (8, 16, 12.0), (8, 0, 0.5), (4, 3, 3.0), (2, 0, 1.0), (8, -5, 1e4), (11, 9, 5.0)],
)
def test_no_code_is_cheaper(bits: int, shift: int, price: float) -> None:
    codebook = Codebook.of(bits, shift, price)
    got, least = costs(codebook, (torch.rand(1000) - 0.5) * 2.5 * 2.0 ** (bits - 1))
    # A threshold is off by a 128th of a step at most, where the costs of neighbours part by twice
    # their distance a step.
    gap = float(codebook.codes.diff().max()) if len(codebook.codes) > 1 else 0.0
    assert float((got - least).max()) <= 2 * gap / 128 + 1e-9


def test_a_price_is_a_penalty_of_the_quantiser() -> None:
    weight = torch.randn(7, 300)
    scheme = Scheme(8)
    codes = np.arange(-127, 128)
    penalty = 3.0 * torch.from_numpy(hamming_weights(codes, 8)).float()
    theirs = quantize(weight, scheme, rounding=Rounding(penalty, reach=16))
    codebook = Codebook.of(8, 0, 3.0)
    ours = codebook.round(weight / theirs.scales)
    # Positions within a 128th of a threshold may differ, and -128, which the scheme has not.
    assert float((ours != theirs.codes()).float().mean()) < 0.02


def test_a_codebook_names_what_is_out_of_range() -> None:
    for call, words in (
        (lambda: Codebook.of(1), "bits: got 1"),
        (lambda: Codebook.of(8, 128), "shift: got 128"),
        (lambda: Codebook.of(8, 0, -1.0), "price: got -1.0"),
        (lambda: Codebook.of(8, 0, float("nan")), "price: got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv1d(4, 16, 3, padding=1)
        self.second = nn.Linear(16, 8)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)).mean(-1))
        return out


INPUTS = torch.randn(64, 4, 9, generator=torch.Generator().manual_seed(5))


def distil(module: Tiny) -> Callable[[int], Tensor]:
    with torch.no_grad():
        want = Tiny()(INPUTS)
    return lambda step: (module(INPUTS) - want).square().mean() / want.square().mean()


def test_training_gives_fewer_ones_and_keeps_the_outputs() -> None:
    module, rounded = Tiny(), Tiny()
    loss = distil(module)
    options = {"shift": 16, "price": 12.0}
    start = fit(rounded, distil(rounded), steps=0, **options)
    report = fit(
        module,
        loss,
        steps=60,
        ratio=1e-3,
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3),
        **options,
    )
    with torch.no_grad():
        before, after = float(distil(rounded)(0)), float(loss(0))
    assert report.cut > 0.3
    assert report.before == pytest.approx(start.before)
    assert after < before / 2
    # -25 dB of the outputs' power.
    assert after < 10**-2.5
    assert len(report.losses) == 60
    assert "first" in str(report)


def test_the_regulariser_alone_lowers_the_ones() -> None:
    module = Tiny()
    report = fit(
        module,
        lambda step: 0.0 * module(INPUTS).sum(),
        steps=40,
        ratio=1.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    assert report.after < report.before - 0.08
    assert all(layer.after < layer.start for layer in report.layers)


def test_the_module_holds_the_codes_that_are_reported() -> None:
    module = Tiny()
    report = fit(module, distil(module), steps=3, shift=5, price=2.0, ratio=1e-2)
    for layer in report.layers:
        weight = module.get_submodule(layer.name).weight
        assert isinstance(weight, nn.Parameter)
        names = {"first.weight", "first.bias", "second.weight", "second.bias"}
        assert set(dict(module.named_parameters())) == names
        scale = layer.scales.reshape(-1, *(1,) * (weight.ndim - 1))
        assert torch.equal(weight.detach(), (layer.codes.float() - 5) * scale)
        ones = sum((int(code) & 255).bit_count() for code in layer.codes.flatten())
        assert layer.after == pytest.approx(ones / (8 * weight.numel()))


def test_a_seed_gives_the_same_bits_and_leaves_the_callers_generator() -> None:
    found = []
    for _ in range(2):
        module = Tiny()
        loss = distil(module)
        torch.manual_seed(1)
        report = fit(
            module,
            lambda step, module=module, loss=loss: (
                loss(step) + 1e-3 * (module(torch.randn(4, 4, 9)).square().mean())
            ),
            steps=4,
            seed=7,
        )
        found.append((report.losses, torch.rand(1)))
    assert found[0] == found[1]
    torch.manual_seed(1)
    assert torch.rand(1) == found[0][1]


def test_layers_have_their_own_settings() -> None:
    module = Tiny()
    report = fit(
        module,
        distil(module),
        steps=1,
        layers=["second", "first"],
        shift={"first": 3, "second": 8},
        price={"first": 0.0, "second": 9.0},
        ratio={"first": 0.0, "second": 1.0},
        bits=6,
    )
    assert [(x.name, x.shift) for x in report.layers] == [("second", 8), ("first", 3)]


def test_a_failure_leaves_the_weights_as_they_were() -> None:
    module = Tiny()
    want = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"loss\(0\): got nan, expected a finite number"):
        fit(module, lambda step: module(INPUTS).sum() * float("nan"), steps=2)
    with pytest.raises(KeyError):
        fit(module, lambda step: {}[step], steps=2)
    with pytest.raises(TypeError, match=r"loss\(0\): got float, expected a scalar Tensor"):
        fit(module, lambda step: 1.0, steps=2)
    assert all(torch.equal(p, want[name]) for name, p in module.named_parameters())


def test_names_what_is_wrong() -> None:
    module = Tiny()
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    broken = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(broken[0].weight, float("inf"))
    frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    loss = distil(module)
    for call, error, words in (
        (lambda: fit(None, loss, steps=1), TypeError, "module: got NoneType"),
        (lambda: fit(module, loss, steps=-1), ValueError, "steps: got -1"),
        (lambda: fit(module, loss, steps=1.5), TypeError, "steps: got 1.5"),
        (lambda: fit(module, loss, steps=1, layers=["third"]), ValueError, "layers: got 'third'"),
        (lambda: fit(module, loss, steps=1, layers=[]), ValueError, "layers: got none"),
        (lambda: fit(module, loss, steps=1, layers="first"), TypeError, "layers: got the string"),
        (lambda: fit(module, loss, steps=1, bits=17), ValueError, "layer 'first': bits: got 17"),
        (lambda: fit(module, loss, steps=1, shift={"x": 1}), ValueError, "shift: got layer 'x'"),
        (
            lambda: fit(module, loss, steps=1, shift={"first": 1}),
            ValueError,
            "shift: got none for layer 'second'",
        ),
        (lambda: fit(module, loss, steps=1, ratio=-1.0), ValueError, "ratio of 'first': got -1.0"),
        (lambda: fit(nn.ReLU(), loss, steps=1), ValueError, "layers: got none"),
        (lambda: fit(shared, loss, steps=1), ValueError, "layer '1': got the weight of '0'"),
        (lambda: fit(broken, loss, steps=1), ValueError, "layer '0': weight: got a number that"),
        (lambda: fit(frozen, loss, steps=1), ValueError, "layer '0': got a frozen weight"),
        (lambda: fit(Tiny().double(), loss, steps=1), TypeError, "got a weight of torch.float64"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)


def test_a_module_is_as_it_came_when_a_loss_fails() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {name: x.clone() for name, x in module.state_dict().items()}
    x = torch.randn(20, 6)

    def loss(step: int) -> Tensor:
        return module(x).square().mean() * (float("nan") if step == 2 else 1.0)

    with pytest.raises(ValueError, match=r"loss\(2\): got nan"):
        fit(module, loss, steps=3)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_loss_without_a_gradient_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss\(0\): got no gradient"):
        fit(nn.Linear(3, 2), lambda _: torch.tensor(1.0), steps=1)


def test_weights_of_any_layout_are_trained_alike() -> None:
    x = torch.randn(2, 4, 6, 6)
    rates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
        report = fit(layer, lambda _, layer=layer: layer(x).square().mean(), steps=3, ratio=0.1)
        rates.append(report.after)
    assert rates[0] == pytest.approx(rates[1], abs=2e-3)


def test_weights_of_zeros_have_no_ones_to_cut() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert fit(layer, lambda _: layer(torch.ones(1, 3)).sum(), steps=0).cut == 0.0


def test_a_price_whose_table_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"price: got 1000000000\.0, expected 0 to"):
        Codebook.of(8, 0, 1e9)
