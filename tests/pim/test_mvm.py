"""The product by bits against integer products of torch and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quernstone.pim import Array, Macro, formulations, mvm, reference
from quernstone.pim.checks import span
from tests.pim.cases import layer


def check(macro: Macro, outputs: int, inputs: int, vectors: int, seed: int = 0) -> None:
    weights, x = layer(macro, outputs, inputs, vectors, seed)
    want = (torch.from_numpy(x) @ torch.from_numpy(weights).T).numpy()
    array = Array(weights, macro)
    for formulation in ("auto", *formulations()):
        np.testing.assert_array_equal(array.mvm(x, formulation=formulation), want)
    np.testing.assert_array_equal(reference.mvm(weights, x, macro), want)


@pytest.mark.parametrize("signs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bits", [(8, 8), (1, 1), (4, 7), (9, 5), (16, 16), (2, 12)])
def test_every_formulation_gives_the_product_of_integers(
    isa: str, bits: tuple[int, int], signs: tuple[bool, bool]
) -> None:
    macro = Macro(100, 64, *bits, *signs)
    for shape in ((1, 1, 1), (33, 65, 7), (65, 250, 40)):
        check(macro, *shape)


@settings(max_examples=40, deadline=None)
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
    shape=st.tuples(st.integers(0, 70), st.integers(0, 210), st.integers(0, 7)),
    seed=st.integers(0, 1000),
)
def test_any_macro_gives_the_product_of_integers(
    macro: Macro, shape: tuple[int, int, int], seed: int
) -> None:
    check(macro, *shape, seed)


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_integers_do_not_run_over(isa: str, signed: bool) -> None:
    macro = Macro(
        rows=4096, weight_bits=16, input_bits=16, weight_signed=signed, input_signed=signed
    )
    for value in span(16, signed):
        weights, x = np.full((2, 9000), value), np.full((1, 9000), value)
        assert mvm(weights, x, macro).tolist() == [[9000 * value * value] * 2]


def test_how_lines_are_driven_does_not_change_the_product() -> None:
    weights, x = layer(Macro(), 10, 100, 10)
    want = mvm(weights, x, Macro())
    for macro in (
        Macro(order="msb"),
        Macro(idle=3),
        Macro(zero_gating=True),
        Macro(rows=7, banks=3),
    ):
        np.testing.assert_array_equal(mvm(weights, x, macro), want)


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match=r"inputs.shape\[1\]: got 3, expected 4"):
        mvm(np.ones((2, 4), int), np.ones((1, 3), int), Macro())
    with pytest.raises(ValueError, match="formulation: got 'none'"):
        mvm(np.ones((2, 4), int), np.ones((1, 4), int), Macro(), formulation="none")
