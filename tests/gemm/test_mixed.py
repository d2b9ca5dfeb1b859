"""Products of many tokens by tiles of bf16, chosen by the call; of few, those of int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quernstone.quant.linear import PackedLinear, PackedMatrix
from tests.gemm.cases import FORMS, Form, normal, packed
from tests.gemm.test_products import product

MANY = 64
# Around blocks of 16 outputs and pairs of them, sixteen blocks, and runs of 512 inputs.
SHAPES = ((1, 1), (17, 33), (50, 130), (33, 545), (300, 1030))
# Around tiles of 16 and pairs of them, and the tokens that one expansion serves.
TOKENS = (64, 65, 79, 80, 81, 96, 97, 255, 257)


def rounded(x: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.from_numpy(x).bfloat16().double().numpy()


def bound_of(inputs: int) -> float:
    """Of a sum beside the sum of its magnitudes: roundings of fp32 that a product passes.

    Sixteen of its own tile's, two where the halves of a tile's sum and the sum so far meet, one for
    each later tile, and one of an output's scale.
    """
    return (16 + 2 + -(-inputs // 32) + 4 + 1) * 2.0**-24


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_those_of_numbers_rounded_to_bf16(form: Form, isa: str) -> None:
    otherwise = "float" if form.format == "bf16" else "int8"
    for outputs, inputs in SHAPES:
        layout, data, weights = packed(form, normal(outputs, inputs))
        # int8 enters as its codes; int4 as codes times scales, which bf16 rounds.
        seen_weights = rounded(weights) if form.format == "int4" else weights
        for tokens in TOKENS:
            x = normal(tokens, inputs, seed=tokens).numpy()
            got = product(layout, data, x, "mixed", outputs)
            if isa != "avx512_amx":  # has no such tiles
                assert np.array_equal(got, product(layout, data, x, otherwise, outputs))
                continue
            seen = rounded(x)
            error = np.abs(got - seen @ seen_weights.T) / (np.abs(seen) @ np.abs(seen_weights.T))
            assert error.max() <= bound_of(inputs), (outputs, inputs, tokens)
            # Beside no rounding at all: half a unit of bf16 for each of two factors.
            exact = x.astype(np.float64) @ weights.T
            error = np.abs(got - exact) / (np.abs(x) @ np.abs(weights.T))
            assert error.max() <= 2 * 2.0**-8 + 2.0**-16 + bound_of(inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_few_tokens_and_levels_without_tiles_have_the_bits_of_int8(form: Form, isa: str) -> None:
    layout, data, _ = packed(form, normal(50, 257))
    otherwise = "float" if form.format == "bf16" else "int8"
    for tokens in (1, 5, 63, 64, 67):
        if isa == "avx512_amx" and tokens >= MANY:
            continue
        x = normal(tokens, 257, seed=tokens).numpy()
        want = product(layout, data, x, otherwise, 50)
        assert np.array_equal(product(layout, data, x, "mixed", 50), want)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_among_many_is_the_same_in_any_place_and_on_any_threads(
    form: Form, isa: str
) -> None:
    layout, data, _ = packed(form, normal(600, 545))
    x = normal(300, 545, seed=1).numpy()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = product(layout, data, x, "mixed", 600)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert np.array_equal(product(layout, data, x, "mixed", 600), whole)
    torch.set_num_threads(before)
    for begin, end in ((0, 64), (7, 71), (100, 165), (230, 300)):
        some = product(layout, data, x[begin:end], "mixed", 600)
        assert np.array_equal(some, whole[begin:end])


def deviation(
    x: NDArray[np.float64], weights: NDArray[np.float64], tiles: bool
) -> NDArray[np.float64]:
    """Of the products, at most, were roundings independent of each other: statistics, no bound.

    The error of a rounding to bf16 is uniform up to 2^-8 of a number or less, so it deviates by
    2^-8 / sqrt 3; of one to an eighth bit of a group of 32, by 1 / (127 sqrt 12) of the largest.
    """
    if tiles:
        return 2.0**-8 * np.sqrt(2 / 3 * x**2 @ (weights**2).T)
    filled = [np.pad(of, ((0, 0), (0, -x.shape[1] % 32))) for of in (x, weights)]
    xs, ws = (of.reshape(len(of), -1, 32) for of in filled)
    step = np.abs(xs).max(-1) / 127
    return np.sqrt(step**2 @ (ws**2).sum(-1).T / 12)


@pytest.mark.parametrize("tokens", [37, 80, 97])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_number_that_is_not_finite_spoils_its_token_alone(
    form: Form, bad: float, tokens: int, isa: str
) -> None:
    layout, data, _ = packed(form, normal(20, 70))
    x = normal(tokens, 70).numpy()
    clean = product(layout, data, x, "mixed", 20)
    spoilt = x.copy()
    spoilt[35, 40] = bad
    got = product(layout, data, spoilt, "mixed", 20)
    assert not np.isfinite(got[35]).any()
    assert np.array_equal(np.delete(got, 35, 0), np.delete(clean, 35, 0))


@pytest.mark.parametrize("tokens", [40, 80, 97])
def test_zeros_and_small_activations_keep_their_size(tokens: int, isa: str) -> None:
    layout, data, weights = packed(Form("int4", 32), normal(20, 64))
    tiles = tokens >= MANY and isa == "avx512_amx"
    for size in (0.0, 1e-30, 1e30):
        x = (size * normal(tokens, 64)).numpy()
        got = product(layout, data, x, "mixed", 20)
        wide = x.astype(np.float64)
        # Six deviations: the largest of two thousand sums is some four away.
        limit = 6 * deviation(wide, weights, tiles)
        limit += bound_of(64) * (np.abs(wide) @ np.abs(weights.T))
        assert (np.abs(got - wide @ weights.T) <= limit).all()


@pytest.mark.parametrize("tokens", [40, 80, 97])
def test_layers_take_it_by_name(tokens: int, isa: str) -> None:
    layer = torch.nn.Linear(70, 50)
    bias = layer.bias.detach().double().numpy()
    x = normal(tokens, 70)
    tiles = tokens >= MANY and isa == "avx512_amx"
    for format in ("bf16", "int8", "int4"):
        made = PackedLinear.of(layer, format=format, compute="mixed")  # type: ignore[arg-type]
        weights, wide = made.matrix.unpack().double().numpy(), x.double().numpy()
        error = np.linalg.norm(made(x).detach().numpy() - (wide @ weights.T + bias))
        # Of thousands of sums the norm is what is expected, to a few percent.
        assert error <= 1.2 * np.linalg.norm(deviation(wide, weights, tiles))
        other = PackedLinear.of(layer, format=format)(x)  # type: ignore[arg-type]
        assert torch.equal(made(x), other) != tiles
        assert "compute=mixed" in repr(made)
    with pytest.raises(ValueError, match="compute: got 'int8' with bf16 weights, expected 'float'"):
        PackedMatrix.pack(layer.weight.detach(), format="bf16")(x, compute="int8")
