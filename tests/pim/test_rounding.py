"""Rounding to few ones: the objective, against all codes, and GPTQ where a one costs nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from quernstone.pim.rounding import hamming_round, hamming_rounding
from quernstone.quant import Rounding, Scheme, quantize
from tests.pim import networks


def _problem(n: int = 6, k: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    x = networks.rows(200, k, seed).double()
    scale = weight.abs().amax(1) / 100
    return weight, x.T @ x / len(x), scale


def _ones(stored: Tensor, bits: int = 8) -> int:
    return sum(int(v & ((1 << bits) - 1)).bit_count() for v in stored.flatten().tolist())


def _noise(weight: Tensor, hessian: Tensor, scale: Tensor, stored: Tensor, shift: int) -> float:
    off = (stored.double() - shift) * scale.double()[:, None] - weight.double()
    return float(((off @ hessian) * off).sum())


@pytest.mark.parametrize("shift", [0, 5, -3])
def test_independent_inputs_get_the_best_of_all_codes(shift: int) -> None:
    # With a diagonal Hessian nothing can be corrected for: each weight stands alone.
    weight, _, scale = _problem(4, 7)
    hessian = torch.diag(torch.linspace(0.5, 3, 7)).double()
    price = 40 * float(scale.square().mean())
    got = hamming_round(weight, hessian, scale, price=price, shift=shift, reach=300, damping=0.0)
    codes = torch.arange(-128, 128)
    ones = torch.tensor([int(c & 255).bit_count() for c in codes.tolist()])
    off = (codes - shift) * scale.double()[:, None, None] - weight.double()[:, :, None]
    cost = off.square() * hessian.diagonal()[:, None] + price * ones
    chosen = cost.gather(2, (got.long() + 128)[..., None])[..., 0]
    torch.testing.assert_close(chosen, cost.amin(-1), rtol=1e-9, atol=0)


def test_is_near_the_best_of_all_codes_where_inputs_depend_on_each_other() -> None:
    weight, hessian, scale = _problem(1, 3, seed=2)
    scale = scale * 16
    price = 0.5 * float(scale.square().mean())
    got = hamming_round(weight, hessian, scale, price=price, bits=4, damping=0.0)

    def cost(stored: Tensor) -> float:
        return _noise(weight, hessian, scale, stored, 0) + price * _ones(stored, 4)

    every = [cost(torch.tensor([c])) for c in itertools.product(range(-8, 8), repeat=3)]
    nearest = (weight / scale[:, None]).round().clamp(-8, 7)
    assert min(every) <= cost(got) <= cost(nearest.long())
    # Greedy, yet among the best hundredth.
    assert np.mean(np.array(every) < cost(got) - 1e-12) < 0.01


def test_without_price_and_shift_it_is_gptq() -> None:
    weight, hessian, _ = _problem(9, 33)
    # Strongest inputs first is the order that `quantize` keeps.
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    scheme = Scheme(8, full_range=True)
    want = quantize(weight, scheme, method="gptq", hessian=hessian)
    got = hamming_round(weight, hessian, want.scales[:, 0], price=0.0)
    assert torch.equal(got, want.codes())


def test_the_penalty_goes_through_quantize() -> None:
    weight, hessian, _ = _problem(9, 33)
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    scheme = Scheme(8, full_range=True)
    price = 1e-4
    rounding = hamming_rounding(price)
    want = quantize(weight, scheme, method="gptq", hessian=hessian, rounding=rounding)
    got = hamming_round(weight, hessian, want.scales[:, 0], price=price)
    assert torch.equal(got, want.codes())
    plain = quantize(weight, scheme, method="gptq", hessian=hessian)
    assert _ones(got) < _ones(plain.codes())


def test_dearer_ones_are_fewer_and_the_error_is_what_they_cost() -> None:
    weight, hessian, scale = _problem(32, 40)
    unit = float(scale.square().mean() * hessian.diagonal().mean())
    found = [hamming_round(weight, hessian, scale, price=p * unit) for p in (0, 0.1, 1.0, 10.0)]
    ones = [_ones(stored) for stored in found]
    noise = [_noise(weight, hessian, scale, stored, 0) for stored in found]
    assert ones == sorted(ones, reverse=True)
    assert ones[-1] < 0.7 * ones[0]
    assert noise == sorted(noise)


def test_nothing_leaves_the_bits_whatever_the_shift() -> None:
    weight, hessian, _ = _problem(8, 20)
    for bits, shift in ((8, 100), (4, 7), (3, -4), (12, 500)):
        step = weight.abs().amax(1) / (1 << (bits - 1))
        stored = hamming_round(weight, hessian, step, price=0.0, shift=shift, bits=bits)
        assert int(stored.min()) >= -(1 << (bits - 1))
        assert int(stored.max()) < 1 << (bits - 1)


def test_correction_makes_the_error_smaller_than_choosing_each_code_alone() -> None:
    weight, hessian, scale = _problem(32, 40)
    price = 0.5 * float(scale.square().mean() * hessian.diagonal().mean())
    both = hamming_round(weight, hessian, scale, price=price)
    alone = hamming_round(weight, torch.diag(hessian.diagonal()), scale, price=price)
    total = [
        _noise(weight, hessian, scale, stored, 0) + price * _ones(stored)
        for stored in (both, alone)
    ]
    assert total[0] < 0.8 * total[1]


def test_groups_are_rounded_each_by_its_own_inputs() -> None:
    parts = [_problem(5, 9, seed) for seed in (1, 2, 3)]
    weight, hessian, scale = (torch.stack(x) for x in zip(*parts, strict=True))
    together = hamming_round(weight, hessian, scale, price=1e-4, shift=8)
    for at, part in enumerate(parts):
        assert torch.equal(together[at], hamming_round(*part, price=1e-4, shift=8))


def test_threads_change_nothing() -> None:
    weight, hessian, scale = _problem(67, 150)
    one = hamming_round(weight, hessian, scale, price=1e-4)
    torch.set_num_threads(2)
    assert torch.equal(hamming_round(weight, hessian, scale, price=1e-4), one)


def test_names_what_is_wrong() -> None:
    weight, hessian, scale = _problem()
    bad = weight.clone()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="weight: got a number that is not finite"):
        hamming_round(bad, hessian, scale, price=0.0)
    with pytest.raises(ValueError, match=r"hessian\.shape: got"):
        hamming_round(weight, hessian[:3], scale, price=0.0)
    with pytest.raises(ValueError, match="scale: got a number that is not positive"):
        hamming_round(weight, hessian, 0 * scale, price=0.0)
    with pytest.raises(ValueError, match="price: got -1"):
        hamming_round(weight, hessian, scale, price=-1.0)
    with pytest.raises(ValueError, match="bits: got 1, expected 2 to 16"):
        hamming_round(weight, hessian, scale, price=0.0, bits=1)
    with pytest.raises(ValueError, match="shift: got 128"):
        hamming_round(weight, hessian, scale, price=0.0, shift=128)
    with pytest.raises(TypeError, match=r"weight\.dtype"):
        hamming_round(weight.long(), hessian, scale, price=0.0)
    with pytest.raises(ValueError, match=r"unit: got 'bits'"):
        Rounding(unit="bits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rounding\.unit: got 'output' with method 'rtn'"):
        quantize(weight, Scheme(8, full_range=True), rounding=hamming_rounding(1.0))
