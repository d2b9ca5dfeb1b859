"""Toggles against the plain reference, at every level and by every formulation; the identities."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quernstone.pim import (
    Array,
    Macro,
    formulations,
    hamming_count,
    hamming_rate,
    line_toggles,
    reference,
    toggle_count,
    toggle_rate,
)
from tests.pim.cases import drawn, layer

# Rows and banks around the 64 of a mask and a block, vectors that fill no step of 6 or 32 cycles.
MACROS = [
    Macro(),
    Macro(rows=64, banks=3, order="msb", zero_gating=True),
    Macro(rows=65, banks=65, weight_bits=3, input_bits=9, weight_signed=False, idle=2),
    Macro(128, 64, 16, 16, True, False, "lsb", True, False, 3),
    Macro(1000, 7, 1, 1, False, False, cross_vector=False),
    Macro(100, 33, 5, 7, True, True, "msb", False, True),
    Macro(200, 64, 8, 8, idle=1, zero_gating=True),
    Macro(1, 1, 7, 6, idle=1),
]


def check(macro: Macro, outputs: int, inputs: int, vectors: int, seed: int = 0) -> None:
    weights, x = layer(macro, outputs, inputs, vectors, seed)
    banks = reference.toggles(weights, x, macro)
    macros = reference.macro_toggles(weights, x, macro)
    array = Array(weights, macro)
    for formulation in ("auto", *formulations()):
        for resolution, want in (("bank", banks), ("macro", macros)):
            out = np.full(want.shape, -1, np.int32)
            got = array.toggles(x, resolution, formulation=formulation, out=out)
            assert got.counts is out
            np.testing.assert_array_equal(out, want, err_msg=f"{formulation} {resolution} {macro}")


@pytest.mark.parametrize("macro", MACROS, ids=range(len(MACROS)))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 2), (64, 64, 5), (65, 129, 9), (130, 300, 5)])
def test_every_formulation_counts_what_the_reference_counts(
    isa: str, macro: Macro, shape: tuple[int, int, int]
) -> None:
    check(macro, *shape)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    macro=st.builds(
        Macro,
        rows=st.integers(1, 200),
        banks=st.integers(1, 70),
        weight_bits=st.integers(1, 16),
        input_bits=st.integers(1, 16),
        weight_signed=st.booleans(),
        input_signed=st.booleans(),
        order=st.sampled_from(["lsb", "msb"]),
        zero_gating=st.booleans(),
        idle=st.integers(0, 3),
    ),
    cross_vector=st.booleans(),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 210),
    vectors=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_any_macro_counts_what_the_reference_counts(
    macro: Macro, cross_vector: bool, outputs: int, inputs: int, vectors: int, seed: int
) -> None:
    if not macro.idle:
        macro = dataclasses.replace(macro, cross_vector=cross_vector)
    check(macro, outputs, inputs, vectors, seed)


@pytest.mark.parametrize("macro", MACROS, ids=range(len(MACROS)))
def test_lines_change_as_the_reference_says(isa: str, macro: Macro) -> None:
    for inputs, vectors in ((1, 3), (63, 4), (130, 40)):
        _, x = layer(macro, 1, inputs, vectors)
        np.testing.assert_array_equal(line_toggles(x, macro), reference.line_toggles(x, macro))


def test_long_traces_are_cut_into_tasks_without_a_seam(isa: str) -> None:
    # Runs of zeros longer than a task: a gated line remembers its level across it.
    macro = Macro(rows=70, zero_gating=True)
    x = drawn((700, 70), 8, zeros=0.5)
    x[100:500, ::3] = 0
    weights = drawn((5, 70), 8, seed=1)
    want = reference.toggles(weights, x, macro)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            np.testing.assert_array_equal(toggle_count(weights, x, macro).counts, want)
    finally:
        torch.set_num_threads(threads)


def test_sums_beyond_sixteen_bits_are_exact(isa: str) -> None:
    macro = Macro(rows=8192, banks=2, weight_bits=16, input_bits=1, input_signed=False)
    weights = np.full((2, 8192), -1)
    x = np.ones((1, 8192), np.int64)
    for formulation in formulations():
        counts = toggle_count(weights, x, macro, formulation=formulation).counts
        assert counts.tolist() == [[[8192 * 16] * 2]]
        both = toggle_count(weights, x, macro, "macro", formulation=formulation).counts
        assert both.tolist() == [[[8192 * 16 * 2]]]


@pytest.mark.parametrize("bits", [1, 4, 8, 13])
def test_a_rate_never_exceeds_hr_and_equals_it_where_every_line_changes(bits: int) -> None:
    macro = Macro(rows=96, banks=16, weight_bits=bits, input_bits=bits, input_signed=False)
    weights = drawn((16, 96), bits)
    hr = hamming_rate(weights, bits, per="bank")
    for order in ("lsb", "msb"):
        driven = dataclasses.replace(macro, order=order)
        rates = toggle_rate(weights, drawn((20, 96), bits, False, seed=2), driven)
        assert (rates <= hr).all()
        # The bits in time are 1 0 1 0 ..., vector after vector.
        even = bits % 2 == 0
        word = [sum(1 << b for b in range(s, bits, 2)) for s in (0, 1)]
        first = (1 if order == "msb" else 0) if even else 0
        values = [word[first], word[first if even else 1]]
        x = np.array([values[v % 2] for v in range(6)])[:, None] * np.ones((1, 96), np.int64)
        np.testing.assert_array_equal(
            toggle_rate(weights, x, driven)[0], np.tile(hr, (6 * bits, 1))
        )


def test_complements_of_weights_toggle_the_rest_of_the_changing_rows() -> None:
    macro = Macro(rows=128, banks=8)
    weights, x = layer(macro, 8, 128, 12)
    both = toggle_count(weights, x, macro).counts + toggle_count(~weights, x, macro).counts
    changing = line_toggles(x, macro).sum(axis=1, dtype=np.int64) * 8
    np.testing.assert_array_equal(both[0], np.tile(changing[:, None], (1, 8)))


def test_rows_banks_and_macros_add_up() -> None:
    macro = Macro(rows=50, banks=6)
    weights, x = layer(macro, 20, 120, 6)
    banks, macros, rows = (toggle_count(weights, x, macro, r) for r in ("bank", "macro", "row"))
    assert banks.counts.shape == (3, 48, 20)
    assert macros.counts.shape == (3, 48, 4)
    assert rows.counts.shape == (4, 48, 120)
    assert banks.cells * macro.banks == rows.cells * macro.rows == macros.cells == macro.cells
    np.testing.assert_array_equal(macros.counts.sum(axis=2), banks.counts.sum(axis=2))
    by_tile = rows.counts.sum(axis=0).reshape(48, -1)
    parts = [by_tile[:, r : r + 50].sum(axis=1) for r in range(0, 120, 50)]
    np.testing.assert_array_equal(np.stack(parts), banks.counts.sum(axis=2))


def test_padding_counts_among_the_cells_and_never_toggles() -> None:
    small, large = Macro(rows=64, banks=8), Macro(rows=128, banks=16)
    weights, x = layer(small, 8, 64, 4)
    assert Array(weights, large).padding == 0.75
    assert hamming_rate(weights, 8, per="macro", macro=large) == pytest.approx(
        hamming_rate(weights, 8) / 4, rel=1e-15
    )
    ratio = toggle_rate(weights, x, small) / 2
    np.testing.assert_array_equal(toggle_rate(weights, x, large), ratio)


def test_the_same_integers_of_any_dtype_or_stride_toggle_the_same() -> None:
    macro = Macro(rows=70)
    weights, x = layer(macro, 9, 70, 5)
    want = toggle_count(weights, x, macro).counts
    wide = np.zeros((5, 140), np.int8)
    wide[:, ::2] = x
    for w, y in (
        (weights.astype(np.int8), x.astype(np.int8)),
        (torch.from_numpy(weights), torch.from_numpy(x).to(torch.int16)),
        (weights.astype(np.int8)[::-1][::-1], wide[:, ::2]),
        (np.asfortranarray(weights.astype(np.int16)), np.asfortranarray(x.astype(np.int8))),
        (weights.reshape(9, 7, 10), x.astype(">i4")),
        (weights.astype(">i2"), x.astype(">i2")),
    ):
        np.testing.assert_array_equal(toggle_count(w, y, macro).counts, want)
    repeated = np.broadcast_to(x[:1].astype(np.int8), (4, 70))
    np.testing.assert_array_equal(
        toggle_count(weights, repeated, macro).counts,
        toggle_count(weights, repeated.copy(), macro).counts,
    )


def test_the_count_of_ones_bounds_every_cycle_of_a_tiled_layer() -> None:
    macro = Macro(rows=40, banks=5)
    weights, x = layer(macro, 12, 90, 8)
    ones = hamming_count(weights, 8, per="macro", macro=macro).counts
    assert (toggle_count(weights, x, macro, "macro").counts <= ones[:, None]).all()


W, X = np.ones((4, 8), np.int8), np.ones((2, 8), np.int8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: toggle_rate(W.astype(float), X, Macro()), TypeError, "weights.dtype: got float64"),
        (lambda: toggle_rate(W, X * np.nan, Macro()), TypeError, "inputs.dtype: got float64"),
        (lambda: toggle_rate(W[0], X, Macro()), ValueError, "weights.ndim: got 1, expected 2"),
        (lambda: toggle_rate(W, X[0], Macro()), ValueError, "inputs.ndim: got 1, expected 2"),
        (lambda: toggle_rate(W, X[:, 1:], Macro()), ValueError, "inputs.shape[1]: got 7, expected"),
        (lambda: toggle_rate(W * 9, X, Macro(weight_bits=4)), ValueError, "weights: got 9, expe"),
        (
            lambda: toggle_rate(W, X * -1, Macro(input_signed=False)),
            ValueError,
            "inputs: got -1, expected 0 to 255 (8 bits, unsigned)",
        ),
        (lambda: toggle_rate(W, X, {}), TypeError, "macro: got dict, expected a Macro"),
        (lambda: toggle_rate(W, X, Macro(), "cell"), ValueError, "resolution: got 'cell'"),
        (
            lambda: toggle_rate(W, X, Macro(), formulation="magic"),
            ValueError,
            "formulation: got 'magic'",
        ),
        (
            lambda: Array(W, Macro()).toggles(X, out=np.empty((1, 2, 3), np.int32)),
            ValueError,
            "out.shape: got (1, 2, 3), expected (1, 16, 4)",
        ),
        (
            lambda: Array(W, Macro()).toggles(X, out=np.empty((1, 16, 4))),
            TypeError,
            "out: got float64, expected an array of int32",
        ),
        (
            lambda: Array(W, Macro()).toggles(X, out=np.empty((1, 16, 8), np.int32)[:, :, ::2]),
            ValueError,
            "out: got a strided last axis",
        ),
        (lambda: line_toggles(X[0], Macro()), ValueError, "inputs.ndim: got 1"),
    ],
)
def test_names_what_is_wrong(call: object, error: type, words: str) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    assert words in str(raised.value)


def test_a_formulation_that_a_level_lacks_is_refused(isa: str) -> None:
    for name in {"table", "dot", "tiles"} - set(formulations()):
        with pytest.raises(ValueError, match="formulation: got one that this processor"):
            toggle_rate(W, X, Macro(), formulation=name)


def test_nothing_in_gives_nothing_out(isa: str) -> None:
    macro = Macro()
    assert toggle_count(W, X[:0], macro).counts.shape == (1, 0, 4)
    assert toggle_count(W[:0], X, macro).counts.shape == (1, 16, 0)
    assert toggle_count(W[:, :0], X[:, :0], macro).counts.shape == (0, 16, 4)


def test_layers_and_inputs_may_be_empty() -> None:
    macro = Macro(rows=64, banks=8)
    weights, x = np.ones((10, 70), np.int8), np.ones((4, 70), np.int8)
    assert toggle_rate(weights, x[:0], macro).shape == (2, 0, 10)
    assert toggle_rate(weights[:0], x, macro).shape == (2, 32, 0)
    assert Array(weights, macro).mvm(x[:0]).shape == (0, 10)
    np.testing.assert_array_equal(Array(weights[:, :0], macro).mvm(x[:, :0]), np.zeros((4, 10)))
