"""The Hamming regulariser against Python's own count of bits, finite differences and fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone import num_threads
from quernstone.pim import reference_lhr
from quernstone.pim.lhr import (
    hamming_mean,
    hamming_regulariser,
    hamming_regulariser_into,
    mean_hamming_weight,
    symmetric_scales,
)
from quernstone.quant import Scheme, quantize

ONE = torch.ones(1)
# Sums of at most 8192 fp32 numbers in 16 or fewer lanes, then fp64: 2^-24 for each addition of a
# lane, on numbers of one sign. Without lanes, that of the products alone.
VALUE = 8192 / 8 * 2.0**-24
# Slopes are small integers and halves, exact; the scale's inverse, the factor, their product.
GRADIENT = 4 * 2.0**-24


def slope_at(position: float, bits: int = 8, shift: int = 0) -> float:
    """What the gradient of one weight at `position - shift` is."""
    w = torch.tensor([position - shift], requires_grad=True)
    mean_hamming_weight(w, ONE, bits=bits, shift=shift).backward()
    assert w.grad is not None
    return float(w.grad)


def python_weight(position: float, bits: int) -> float:
    """The interpolation, by `int.bit_count`."""
    high = (1 << (bits - 1)) - 1
    x = min(max(position, -high - 1), high)
    below = int(x // 1)
    mask = (1 << bits) - 1
    at, after = ((code & mask).bit_count() for code in (below, min(below + 1, high)))
    return at + (x - below) * (after - at)


def test_slopes_are_those_of_the_interpolation(isa: str) -> None:
    assert [slope_at(x) for x in (-0.5, 0.5, 7.5, 3.0)] == [-8, 1, -2, 0]
    assert [slope_at(x, 4) for x in (-0.5, 0.5, 3.5, 6.5)] == [-4, 1, -1, 1]
    assert [slope_at(x, shift=16) for x in (15.5, 16.5, 31.5)] == [-3, 1, -4]


def test_an_integer_has_the_mean_of_the_slopes_on_both_sides(isa: str) -> None:
    assert [slope_at(x) for x in (0.0, 1.0, 7.0, 8.0, -1.0)] == [-3.5, 0.5, -0.5, -0.5, -3.5]


def test_codes_that_went_through_fp32_are_integers_still(isa: str) -> None:
    for bits in (2, 5, 8, 12, 16):
        codes = torch.arange(-(1 << (bits - 1)) + 1, (1 << (bits - 1)) - 1).float()[None]
        codes = codes[:, -3000:]  # the largest have the largest errors
        for scale in (0.1, 1 / 3, 123.456):
            w = (codes * scale).requires_grad_()
            scales = torch.tensor([scale])
            mean_hamming_weight(w, scales, bits=bits).backward()
            exact = reference_lhr.slope(codes.double(), bits)
            assert w.grad is not None
            got = w.grad.double() * scales.double() * codes.numel()
            assert torch.allclose(got, exact, rtol=GRADIENT, atol=0)


def test_weights_beyond_the_codes_have_no_slope(isa: str) -> None:
    assert [slope_at(x) for x in (127.5, 1e9, -128.5, -1e9, float("inf"))] == [0] * 5
    # At the last code one of the two sides is flat.
    assert [slope_at(x) for x in (127.0, -128.0)] == [0.5, 0.5]
    assert mean_hamming_weight(torch.tensor([1e30]), ONE) == 7
    assert mean_hamming_weight(torch.tensor([-1e30]), ONE) == 1
    assert slope_at(128.5, shift=16) == 0


@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_have_the_ones_that_python_counts(bits: int, isa: str) -> None:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.arange(low, high + 1)
    for shift in (0, min(high, 3), -min(high, 2)):
        stored = (codes + shift).clamp(low, high).tolist()
        ones = sum((code & ((1 << bits) - 1)).bit_count() for code in stored)
        got = mean_hamming_weight(codes.float(), ONE, bits=bits, shift=shift)
        assert float(got) == pytest.approx(ones / len(codes), rel=VALUE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 11, 16])
def test_reals_have_what_lies_between(bits: int, isa: str) -> None:
    spread = float(1 << bits)
    x = (torch.rand(257) - 0.5) * 1.1 * spread
    want = sum(python_weight(float(v), bits) for v in x) / len(x)
    assert float(mean_hamming_weight(x, ONE, bits=bits)) == pytest.approx(want, rel=VALUE)


@pytest.mark.parametrize("bits", [3, 8, 13])
@pytest.mark.parametrize("shift", [0, 3, -2])
def test_gradients_are_finite_differences(bits: int, shift: int, isa: str) -> None:
    # Steps of a sixteenth from positions at odd thirty-seconds stay between two integers.
    span = 1 << (bits - 1)
    position = (torch.randint(-span * 16, span * 16, (41,)) * 2 + 1) / 32
    w = position.requires_grad_()
    mean_hamming_weight(w, ONE, bits=bits, shift=shift).backward()
    assert w.grad is not None
    for i in range(0, 41, 4):
        ends = []
        for step in (-1 / 64, 1 / 64):
            moved = position.detach().clone()
            moved[i] += step
            ends.append(reference_lhr.interpolated(moved.double() + shift, bits).sum())
        difference = (ends[1] - ends[0]) * 32 / 41
        assert float(w.grad[i]) == pytest.approx(float(difference), abs=1e-12, rel=GRADIENT)


SHAPES = [(1,), (7,), (15, 1), (16,), (17,), (3, 63), (2, 64), (5, 5, 3, 3), (3, 4099), (130, 128)]


def scales_of(weight: Tensor, kind: str) -> tuple[Tensor, int]:
    width = weight.numel() // weight.shape[0]
    if kind == "tensor":
        return symmetric_scales(weight, granularity="tensor"), 0
    if kind == "channel":
        return symmetric_scales(weight) * 0.7, 0
    group = min(5 if kind == "group" else 64, width)
    return symmetric_scales(weight, granularity="group", group=group) * 0.7, group


@pytest.mark.parametrize("kind", ["tensor", "channel", "group", "group of 64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 12])
def test_equals_the_reference(shape: tuple[int, ...], kind: str, bits: int, isa: str) -> None:
    weight = torch.randn(shape, requires_grad=True)
    twin = weight.detach().double().requires_grad_()
    scales, group = scales_of(weight, kind)
    scales = scales * 2.0 ** (8 - bits)
    width = weight.numel() // weight.shape[0]
    spread = group or width
    if kind == "tensor":
        twin_rows = twin.reshape(1, -1)
        spread = weight.numel()
    else:
        twin_rows = twin.reshape(shape[0], -1)
    want = reference_lhr.mean_hamming_weight(twin_rows, scales, spread, bits, 5)
    want.square().backward()
    want = want.detach()
    loss = hamming_regulariser(weight, scales, bits=bits, shift=5, group=group)
    loss.backward()
    assert weight.grad is not None
    assert twin.grad is not None
    assert float(loss.detach()) == pytest.approx(float(want.square()), rel=3 * VALUE)
    tolerance = {"rtol": GRADIENT + 3 * VALUE, "atol": 0.0}
    close = torch.isclose(weight.grad.double(), twin.grad, **tolerance)
    # fp32 positions may lie on the other side of a margin's edge: within the error that the margin
    # was made for, never elsewhere.
    if not bool(close.all()):
        position = reference_lhr.positions(twin_rows.detach(), scales, spread, 5)
        away = (position - position.round()).abs().reshape(shape)[~close]
        edge = reference_lhr.margin(bits)
        assert bool(((away - edge).abs() <= edge).all())


# The last ones are written past the caches, in whole blocks and in part of one.
LARGE = [((520, 8192), "group of 64"), ((3, 1_400_001), "tensor"), ((3, 1_400_001), "channel")]
KINDS = ("tensor", "channel", "group", "group of 64")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("shape", "kind"), [*((s, k) for s in SHAPES for k in KINDS), *LARGE], ids=str
)
def test_one_call_gives_what_autograd_gives(
    shape: tuple[int, ...], kind: str, accumulate: bool, isa: str
) -> None:
    weight = torch.randn(shape, requires_grad=True)
    scales, group = scales_of(weight, kind)
    options: dict[str, Any] = {"shift": -3, "group": group}
    loss = 0.25 * hamming_regulariser(weight, scales, **options)
    loss.backward()
    assert weight.grad is not None
    start = 1e-3 / weight.numel() if accumulate else float("nan")
    grad = torch.full(shape, start)
    value = hamming_regulariser_into(
        weight, scales, grad, factor=0.25, accumulate=accumulate, **options
    )
    assert value == pytest.approx(float(loss.detach()), rel=2.0**-22)
    want = weight.grad + start if accumulate else weight.grad
    # Of two sums, the larger rounds.
    at_most = 4 * GRADIENT * weight.grad.abs().max()
    assert float((grad - want).abs().max()) <= float(at_most)
    assert not bool(grad.isnan().any())


def test_no_thread_changes_a_bit() -> None:
    weight = torch.randn(300, 1000)
    scales = symmetric_scales(weight)
    before = num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grad = torch.empty_like(weight)
        value = hamming_regulariser_into(weight, scales, grad, accumulate=False)
        found.append((value, grad))
    torch.set_num_threads(before)
    assert all(value == found[0][0] and torch.equal(grad, found[0][1]) for value, grad in found)


def test_the_scales_are_those_of_the_quantiser() -> None:
    weight = torch.randn(6, 40)
    for granularity, group in (("tensor", 0), ("channel", 0), ("group", 16)):
        scheme = Scheme(8, granularity=granularity, group=group)
        made = symmetric_scales(weight, granularity=granularity, group=group)
        quantized = quantize(weight, scheme)
        assert torch.equal(made, quantized.scales)
        got = mean_hamming_weight(quantized.dequantize(), made, group=group)
        ones = [(int(code) & 255).bit_count() for code in quantized.codes().flatten()]
        assert float(got) == pytest.approx(sum(ones) / 240, rel=1e-4)  # codes within the margin


def test_nan_in_nan_out(isa: str) -> None:
    weight = torch.randn(40)
    weight[33] = float("nan")
    leaf = weight.requires_grad_()
    loss = hamming_regulariser(leaf, ONE)
    loss.backward()
    assert loss.isnan()
    assert leaf.grad is not None
    assert leaf.grad[33].isnan()


def test_strides_do_not_matter() -> None:
    weight = torch.randn(12, 9)
    scales = torch.rand(9) + 0.1
    want = mean_hamming_weight(weight.T.contiguous(), scales)
    assert torch.equal(mean_hamming_weight(weight.T, scales), want)
    assert torch.equal(mean_hamming_weight(weight.T, torch.stack([scales] * 2, 1)[:, :1]), want)


def test_the_operator_keeps_torchs_rules() -> None:
    weight = torch.randn(3, 20, requires_grad=True)
    scales = torch.rand(3, 1) + 0.1
    torch.library.opcheck(hamming_mean, (weight, scales, 20, 8, 3))
    grad = torch.zeros(3, 20)
    torch.library.opcheck(
        torch.ops.quernstone.hamming_squared_into.default,
        (weight.detach(), scales, 20, 8, 3, 0.5, True, grad),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    (first,) = torch.autograd.grad(hamming_regulariser(weight, scales), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of its gradient"):
        first.sum().backward()


def test_the_reference_has_its_own_gradient() -> None:
    # At odd sixteenths, between integers whatever gradcheck's steps.
    position = (torch.randint(-1900, 1900, (3, 8)) * 2 + 1).double() / 32
    weight = position.requires_grad_()
    scales = torch.tensor([[1.0], [0.5], [2.0]])
    assert torch.autograd.gradcheck(
        lambda w: reference_lhr.mean_hamming_weight(w, scales, 8, 8, 4).square(), weight
    )


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: mean_hamming_weight(torch.ones(2, 2), ONE, bits=1), ValueError, "bits: got 1, "),
    (lambda: mean_hamming_weight(torch.ones(2, 2), ONE, bits=17), ValueError, "bits: got 17, "),
    (lambda: mean_hamming_weight(torch.ones(2, 2), ONE, bits=8.0), TypeError, "bits: got 8.0"),
    (lambda: mean_hamming_weight(torch.ones(2), ONE, shift=128), ValueError, "shift: got 128"),
    (lambda: mean_hamming_weight(torch.ones(0, 2), ONE), ValueError, "weight.shape: got (0, 2)"),
    (lambda: mean_hamming_weight(torch.ones(2).half(), ONE), TypeError, "weight.dtype: got"),
    (lambda: mean_hamming_weight(torch.ones(2).long(), ONE), TypeError, "weight.dtype: got"),
    (lambda: mean_hamming_weight([1.0], ONE), TypeError, "weight: got list"),
    (lambda: mean_hamming_weight(torch.ones(2, 2), 1.0), TypeError, "scales: got float"),
    (lambda: mean_hamming_weight(torch.ones(2, 2), ONE.double()), TypeError, "scales.dtype"),
    (lambda: mean_hamming_weight(torch.ones(2, 2), -ONE), ValueError, "scales: got a number"),
    (lambda: mean_hamming_weight(torch.ones(2), ONE / 0), ValueError, "scales: got a number"),
    (lambda: mean_hamming_weight(torch.ones(2), ONE * 0), ValueError, "scales: got a number"),
    (lambda: mean_hamming_weight(torch.ones(2, 4), torch.ones(3)), ValueError, "scales.shape"),
    (lambda: mean_hamming_weight(torch.ones(2, 4), torch.ones(2, 2)), ValueError, "scales.shape"),
    (
        lambda: mean_hamming_weight(torch.ones(2, 4), torch.ones(2, 1), group=3),
        ValueError,
        "scales.shape: got (2, 1), expected (2, 2)",
    ),
    (lambda: mean_hamming_weight(torch.ones(2, 4), ONE, group=5), ValueError, "group: got 5"),
    (
        lambda: hamming_regulariser_into(torch.ones(2), ONE, torch.ones(3)),
        ValueError,
        "grad.shape: got (3,), expected (2,)",
    ),
    (
        lambda: hamming_regulariser_into(torch.ones(2), ONE, torch.ones(2).double()),
        TypeError,
        "grad.dtype",
    ),
    (
        lambda: hamming_regulariser_into(torch.ones(4, 2).T, ONE, torch.ones(2, 4)),
        ValueError,
        "weight: got strides (1, 2)",
    ),
    (
        lambda: hamming_regulariser_into(torch.ones(2), ONE, torch.ones(2), factor=float("nan")),
        ValueError,
        "factor: got nan",
    ),
    (lambda: symmetric_scales(torch.ones(2), granularity="row"), ValueError, "granularity: got"),
    (lambda: symmetric_scales(torch.ones(2), group=2), ValueError, "group: got 2"),
    (lambda: symmetric_scales(torch.ones(2) / 0), ValueError, "weight: got a number"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_names_what_is_wrong(call: Callable[[], object], error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_a_gradient_in_the_memory_of_its_weight_is_refused() -> None:
    memory = torch.randn(61)
    weight = memory[:60].view(6, 10)
    with pytest.raises(ValueError, match="grad: got memory of the weight"):
        hamming_regulariser_into(weight, torch.ones(6), memory[1:].view(6, 10))
