"""Ones of weights against Python's own count of bits, and the identities of the rate."""

import numpy as np
import pytest
import torch

from quernstone.pim import Macro, hamming_count, hamming_rate, hamming_weights, reference
from quernstone.pim.checks import span
from tests.pim.cases import drawn


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 17))
def test_counts_what_python_counts(bits: int, signed: bool) -> None:
    weights = drawn((5, 7), bits, signed)
    ones = [[(int(w) & ((1 << bits) - 1)).bit_count() for w in row] for row in weights]
    assert hamming_weights(weights, bits, signed=signed).tolist() == ones
    assert hamming_count(weights, bits, signed=signed).counts == np.sum(ones)
    assert hamming_rate(weights, bits, signed=signed) == np.sum(ones) / (35 * bits)


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 65, 2047, (1 << 20) + 5])
def test_one_pass_over_memory_counts_the_same_at_every_level(
    isa: str, bits: int, size: int
) -> None:
    for signed in (True, False):
        kind = "i" if signed else "u"
        weights = drawn((size,), bits, signed).astype(f"{kind}{1 if bits <= 8 else 2}")
        count = hamming_count(weights, bits, signed=signed)
        want = reference.hamming_weights(weights, bits).sum(dtype=np.int64)
        assert (count.counts, count.cells) == (want, size * bits)


@pytest.mark.parametrize("bits", [1, 4, 7, 12, 15])
@pytest.mark.parametrize("place", [0, 100, 129])
def test_one_weight_out_of_range_is_found_wherever_it_is(isa: str, bits: int, place: int) -> None:
    for signed in (True, False):
        weights = np.zeros(130, f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
        low, high = span(bits, signed)
        for wrong in (high + 1, low - 1):
            if wrong >= 0 or signed:
                weights[place] = wrong
                with pytest.raises(ValueError, match=rf"weights: got {wrong}, expected {low} to"):
                    hamming_rate(weights, bits, signed=signed)


@pytest.mark.parametrize("place", [0, 17_001, 40_000, 65_535, 65_600, 65_637])
def test_one_weight_out_of_range_is_found_where_streams_are_read_side_by_side(
    isa: str, place: int
) -> None:
    weights = np.full(65_638, 7, np.int8)
    assert hamming_count(weights, 4).counts == 3 * weights.size
    weights[place] = 8
    with pytest.raises(ValueError, match="weights: got 8, expected -8 to 7"):
        hamming_count(weights, 4)


def test_weights_that_are_strided_or_of_another_byte_order_count_the_same() -> None:
    weights = drawn((40, 50), 8)
    want = hamming_count(weights, 8).counts
    wide = np.zeros((40, 100), np.int8)
    wide[:, ::2] = weights
    for other in (
        weights.astype(np.int8).T,
        weights.astype(">i2"),
        wide[:, ::2],
        weights.astype(np.int8)[::-1],
    ):
        assert hamming_count(other, 8).counts == want


def test_a_complement_has_the_other_ones() -> None:
    weights = drawn((33, 65), 8).astype(np.int8)
    assert hamming_rate(weights, 8) + hamming_rate(~weights, 8) == pytest.approx(1, abs=1e-15)


def test_rates_of_rows_banks_and_macros_are_parts_of_the_whole() -> None:
    macro = Macro(rows=16, banks=4)
    weights = torch.from_numpy(drawn((10, 3, 7), 8).astype(np.int8))
    whole = hamming_count(weights, 8)
    for per, shape in (("row", (21,)), ("bank", (10,)), ("macro", (2, 3))):
        part = hamming_count(weights, 8, per=per, macro=macro)
        assert part.counts.shape == shape
        assert part.counts.sum() == whole.counts
    assert part.cells == 16 * 4 * 8
    assert macro.padding(10, 21) == pytest.approx(1 - 210 / (6 * 64))
    rate = hamming_rate(weights, 8, per="macro", macro=macro)
    assert rate[0, 0] == np.bitwise_count(
        weights.flatten(1)[:4, :16].numpy().view(np.uint8)
    ).sum() / (16 * 4 * 8)


def test_names_what_is_wrong() -> None:
    nan = np.array([[np.nan]])
    for call, error, words in (
        (lambda: hamming_rate(nan, 8), TypeError, "weights.dtype: got float64, expected integers"),
        (lambda: hamming_rate(torch.ones(2, 2), 8), TypeError, "weights.dtype: got torch.float32"),
        (lambda: hamming_rate([[1]], 8), TypeError, "weights: got list"),
        (lambda: hamming_rate(np.ones((2, 2), np.int8), 17), ValueError, "bits: got 17"),
        (lambda: hamming_rate(np.ones((2, 2), np.int8), 0), ValueError, "bits: got 0"),
        (lambda: hamming_rate(np.ones((2, 2), np.int8), 1.5), TypeError, "bits: got 1.5"),
        (lambda: hamming_rate(np.full((2, 2), 8), 4), ValueError, "weights: got 8, expected -8 to"),
        (
            lambda: hamming_rate(np.ones(2, np.int8), 8, per="row"),
            ValueError,
            "weights.ndim: got 1",
        ),
        (lambda: hamming_rate(np.ones((0, 2), np.int8), 8), ValueError, "weights: got none"),
        (lambda: hamming_rate(np.ones((2, 2), int), 8, per="cell"), ValueError, "per: got 'cell'"),
        (lambda: hamming_rate(np.ones((2, 2), int), 8, per="macro"), TypeError, "macro: got None"),
        (lambda: Macro(rows=0), ValueError, "rows: got 0, expected 1 to"),
        (lambda: Macro(input_bits=17), ValueError, "input_bits: got 17, expected 1 to 16"),
        (lambda: Macro(rows=1.0), TypeError, "rows: got 1.0"),
        (lambda: Macro(order="big"), ValueError, "order: got 'big'"),
        (lambda: Macro(idle=1, cross_vector=False), ValueError, "idle: got 1 without"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert words in str(raised.value)
