"""Rounding: to the nearest code, to a dearer one where a penalty says so, and in GPTQ's order."""

from __future__ import annotations

import itertools
import re
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf import quantize as gguf_quantize
from hypothesis import given, settings
from torch import Tensor

from quernstone.quant import Rounding, Scheme, quantize
from quernstone.quant.rounding import LARGEST_WEIGHT
from quernstone.quant.scheme import ScaleKind
from quernstone.quant.tensor import by_scale, undo_by_scale
from tests.quant.test_tensor import schemes, shapes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(schemes, shapes, st.integers(0, 2**31), st.sampled_from([1e-20, 1.0, 1e20]))
def test_unclipped_numbers_come_back_within_half_a_step(
    scheme: Scheme, shape: tuple[int, ...], seed: int, size: float
) -> None:
    if scheme.scale in ("power-of-two", "two-shift"):
        scheme = Scheme(scheme.bits, scheme.symmetric, scheme.granularity, scheme.group)
    x = size * normal(*shape, seed=seed)
    made = quantize(x, scheme)
    grouped = made.scales.unsqueeze(-1).expand_as(by_scale(x, scheme))
    steps = undo_by_scale(grouped.contiguous(), scheme, shape)
    # bf16 rounds a scale by 2^-9, and the end of the range moves by that times half the levels;
    # a rounded zero point moves it by half a step.
    ends = (0.5 if not scheme.symmetric else 0.0) + scheme.levels * 2.0**-9 * (
        scheme.scale == "bf16"
    )
    error = (made.dequantize() - x).abs() / steps
    # Quotient and product are rounded, each by 2^-24 of up to all levels.
    assert float(error.max()) <= (0.5 + ends) * (1 + 1e-5) + scheme.levels * 2.0**-23


def test_int8_groups_are_those_of_ggufs_q8_0() -> None:
    x = normal(6, 64)
    theirs = torch.from_numpy(
        dequantize(gguf_quantize(x.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    )
    ours = quantize(x, Scheme(8, granularity="group", group=32)).dequantize()
    # Their scale is kept as fp16.
    assert float((ours - theirs).abs().max()) <= float(x.abs().max()) * 2.0**-10


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_are_those_of_torch(symmetric: bool) -> None:
    x = normal(5, 40)
    scheme = Scheme(6, symmetric)
    made = quantize(x, scheme)
    zeros = torch.zeros(5) if made.zero_points is None else made.zero_points[:, 0].float()
    theirs = torch.fake_quantize_per_channel_affine(
        x, made.scales[:, 0], zeros, 0, scheme.lowest, scheme.highest
    )
    assert torch.equal(made.dequantize(), theirs)


def test_scales_are_what_the_scheme_can_hold() -> None:
    x = normal(40, 16) * torch.logspace(-6, 6, 40).unsqueeze(1)
    power = quantize(x, Scheme(4, scale="power-of-two")).scales
    assert torch.equal(power.log2(), power.log2().round())
    bf16 = quantize(x, Scheme(4, scale="bf16")).scales
    assert torch.equal(bf16, bf16.bfloat16().float())
    two = quantize(x, Scheme(4, scale="two-shift")).scales
    exact = quantize(x, Scheme(4)).scales
    powers = [2.0**e for e in range(-40, 41)]
    sums = torch.tensor(sorted({a + b for a in powers for b in [0.0, *powers] if b <= a}))
    for got, want in zip(two.flatten(), exact.flatten(), strict=True):
        assert float((got - want).abs()) <= float((sums - want).abs().min()) * (1 + 1e-5)
        assert float((sums - got).abs().min()) == 0.0


def test_trying_scales_never_makes_the_error_larger() -> None:
    x = normal(64, 128)
    scheme = Scheme(4, granularity="group", group=32, full_range=True)
    errors = [float((quantize(x, scheme, clips=n).dequantize() - x).norm()) for n in (1, 4, 16)]
    assert errors[0] > errors[1] >= errors[2]


def test_a_penalty_is_paid_only_where_it_is_worth_it() -> None:
    scheme = Scheme(4, granularity="tensor")
    x = torch.linspace(-7, 7, 200)
    odd_is_dear = Rounding(torch.tensor([0.2 * (code % 2) for code in range(-7, 8)]))
    made = quantize(x, scheme, rounding=odd_is_dear)
    scale = float(made.scales)
    for value, code in zip(x.tolist(), made.codes().tolist(), strict=True):
        costs = {c: (value / scale - c) ** 2 + 0.2 * (c % 2) for c in range(-7, 8)}
        assert costs[code] <= min(costs.values()) + 1e-5


def test_no_penalty_is_the_nearest_code() -> None:
    x = normal(8, 33)
    scheme = Scheme(5)
    free = Rounding(torch.zeros(31))
    assert torch.equal(quantize(x, scheme, rounding=free).codes(), quantize(x, scheme).codes())


def optimal_brain_quantizer(w: Tensor, h: Tensor, made: Any) -> Tensor:
    """Inputs in order, each error spread by the inverse of the Hessian of those that are left.

    Without GPTQ's Cholesky factor: the inverse is made anew for every input (arXiv 2208.11580).
    """
    w, h = w.double().clone(), h.double()
    zeros = torch.zeros_like(made.scales) if made.zero_points is None else made.zero_points
    scheme = made.scheme
    for i in range(w.shape[1]):
        group = i // scheme.group if scheme.group else 0
        scale, zero = made.scales[:, group].double(), zeros[:, group].double()
        code = (w[:, i] / scale + zero).round().clamp(scheme.lowest, scheme.highest)
        error = w[:, i] - (code - zero) * scale
        w[:, i] -= error
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i + 1 :] -= error.unsqueeze(1) * inverse[0, 1:] / inverse[0, 0]
    return w


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4),
        Scheme(3, symmetric=False),
        Scheme(4, granularity="group", group=32),
        Scheme(4, symmetric=False, granularity="group", group=48),
    ],
)
def test_gptq_is_the_optimal_brain_quantiser_in_order(scheme: Scheme) -> None:
    w, x = normal(5, 200), normal(400, 200, seed=1) @ normal(200, 200, seed=2)
    h = 2 / 400 * x.T @ x
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(200)
    made = quantize(w, scheme, method="gptq", hessian=h)
    expected = optimal_brain_quantizer(w, damped, made)
    assert float((made.dequantize().double() - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_layers_output_than_rounding(bits: int) -> None:
    w, x = normal(32, 96), normal(500, 96, seed=1) @ normal(96, 96, seed=2)
    scheme = Scheme(bits, granularity="group", group=32)
    h = 2 / 500 * x.T @ x
    rtn, gptq = (
        (quantize(w, scheme, **how).dequantize() - w) @ x.T
        for how in ({}, {"method": "gptq", "hessian": h})
    )
    assert float(gptq.norm()) < 0.95 * float(rtn.norm())


def test_gptq_rounds_an_input_that_was_never_seen_by_itself() -> None:
    w, x = normal(4, 40), normal(100, 40, seed=1)
    x[:, 7] = 0.0
    made = quantize(w, Scheme(4), method="gptq", hessian=x.T @ x)
    assert torch.equal(made.codes()[:, 7], quantize(w, Scheme(4)).codes()[:, 7])


def test_gptq_takes_penalties_too() -> None:
    w = normal(4, 40)
    h = torch.eye(40)
    table = torch.tensor([2.0 * (code % 2) for code in range(-7, 8)])
    odd_is_dear = Rounding(table)
    codes = quantize(w, Scheme(4), method="gptq", hessian=h, rounding=odd_is_dear).codes()
    assert not bool((codes % 2).any())


def test_zeros_stay_zeros() -> None:
    for symmetric, method in itertools.product((True, False), ("rtn", "gptq")):
        scheme = Scheme(4, symmetric, "group", 8)
        hessian = torch.eye(20) if method == "gptq" else None
        made = quantize(torch.zeros(3, 20), scheme, method=method, hessian=hessian)  # type: ignore[arg-type]
        assert not made.dequantize().any()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, ...]) -> None:
    for scheme in (Scheme(4), Scheme(4, granularity="group", group=8), Scheme(4, False, "tensor")):
        assert quantize(torch.zeros(shape), scheme).dequantize().shape == shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", get_args(ScaleKind))
@pytest.mark.parametrize("bits", [2, 8])
def test_the_largest_weights_come_back_finite(bits: int, scale: Any, symmetric: bool) -> None:
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) * LARGEST_WEIGHT
    scheme = Scheme(bits, symmetric, scale=scale, full_range=symmetric)
    for clips in (1, 4):
        assert bool(torch.isfinite(quantize(x, scheme, clips=clips).dequantize()).all())


def test_a_penalty_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="penalty: got NaN"):
        Rounding(torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="penalty: got list"):
        Rounding([0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "weight: got list"),
        (
            {"weight": torch.zeros(2, 2, dtype=torch.int8)},
            TypeError,
            "weight.dtype: got torch.int8",
        ),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, ValueError, "weight: got a number that"),
        ({"scheme": 4}, TypeError, "scheme: got int"),
        ({"method": "awq"}, ValueError, "method: got 'awq'"),
        ({"method": "gptq"}, ValueError, "hessian: got none with method 'gptq'"),
        ({"hessian": torch.eye(4)}, ValueError, "hessian: got one with method 'rtn'"),
        (
            {"method": "gptq", "hessian": torch.eye(3)},
            ValueError,
            r"hessian.shape: got (3, 3), expected (4, 4)",
        ),
        (
            {"method": "gptq", "hessian": -torch.ones(4, 4) + torch.eye(4) * 1.5},
            ValueError,
            "hessian: got a matrix that is not positive definite",
        ),
        (
            {"method": "gptq", "hessian": torch.eye(4, dtype=torch.float64) * 1e308},
            ValueError,
            "hessian: got a matrix that is not positive definite",
        ),
        (
            {"method": "gptq", "hessian": torch.eye(4) + torch.ones(4, 4).triu(1)},
            ValueError,
            "hessian: got a matrix that is not symmetric",
        ),
        ({"method": "gptq", "hessian": [[1.0]]}, TypeError, "hessian: got list"),
        (
            {"method": "gptq", "hessian": torch.eye(4, dtype=torch.complex64)},
            TypeError,
            "hessian.dtype: got torch.complex64",
        ),
        (
            {"weight": torch.tensor([[1e300]], dtype=torch.float64)},
            ValueError,
            "weight: got a number above 2^125",
        ),
        ({"weight": -torch.full((1, 1), 3e38)}, ValueError, "weight: got a number above 2^125"),
        ({"rounding": None}, TypeError, "rounding: got NoneType"),
        ({"clips": 0}, ValueError, "clips: got 0"),
        ({"damping": 2.0}, ValueError, "damping: got 2.0"),
        ({"rounding": Rounding(torch.zeros(3))}, ValueError, "penalty.shape: got (3,)"),
    ],
)
def test_names_what_it_cannot_quantise(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"weight": torch.eye(4), "scheme": Scheme(4)} | change
    with pytest.raises(error, match=re.escape(message)):
        quantize(**arguments)
