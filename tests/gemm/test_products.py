"""Products with packed weights equal those of their numbers, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernstone import _core
from tests.gemm.cases import FORMS, Form, aligned, as_int8_groups, normal, packed

# Around blocks of 16 outputs, groups of 32 to 128 inputs, and tiles of 2, 4 and 8 tokens.
SHAPES = ((1, 1), (15, 31), (16, 32), (17, 33), (50, 130), (33, 257))
TOKENS = (1, 2, 3, 4, 5, 8, 13, 67)
# Sums of a few hundred fp32 products; codes of activations may round the other way where a
# number lies halfway between two.
FLOAT, INT8 = 2e-6, 2e-4


def product(
    layout: _core.Layout, data: np.ndarray, x: np.ndarray, compute: str, outputs: int
) -> np.ndarray:
    out = np.full((x.shape[0], outputs), np.nan, np.float32)
    _core.multiply(layout, data, x, compute, out)
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_those_of_the_numbers(form: Form, isa: str) -> None:
    for outputs, inputs in SHAPES:
        layout, data, weights = packed(form, normal(outputs, inputs))
        for tokens in TOKENS:
            x = normal(tokens, inputs, seed=tokens).numpy()
            for compute in form.computes:
                seen = x.astype(np.float64) if compute == "float" else as_int8_groups(x)
                want = seen @ weights.T
                got = product(layout, data, x, compute, outputs)
                # Against the largest sum that could have been, so that cancelling does not count.
                size = np.abs(seen) @ np.abs(weights.T)
                bound = FLOAT if compute == "float" else INT8
                assert np.max(np.abs(got - want) / size) <= bound, (outputs, inputs, tokens)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_numbers_come_back(form: Form) -> None:
    for outputs, inputs in SHAPES:
        layout, data, weights = packed(form, normal(outputs, inputs))
        out = np.full((outputs, inputs), np.nan, np.float32)
        _core.unpack(layout, data, out)
        assert np.array_equal(out, weights.astype(np.float32))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_is_the_same_in_any_company_and_on_any_threads(form: Form, isa: str) -> None:
    layout, data, _ = packed(form, normal(50, 257))
    x = normal(13, 257, seed=1).numpy()
    before = torch.get_num_threads()
    for compute in form.computes:
        whole = product(layout, data, x, compute, 50)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert np.array_equal(product(layout, data, x, compute, 50), whole)
        torch.set_num_threads(before)
        for t in range(13):
            assert np.array_equal(product(layout, data, x[t : t + 1], compute, 50)[0], whole[t])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_number_that_is_not_finite_spoils_its_token_alone(
    form: Form, bad: float, isa: str
) -> None:
    layout, data, _ = packed(form, normal(20, 70))
    x = normal(3, 70).numpy()
    for compute in form.computes:
        clean = product(layout, data, x, compute, 20)
        spoilt = x.copy()
        spoilt[1, 40] = bad
        got = product(layout, data, spoilt, compute, 20)
        assert not np.isfinite(got[1]).any()
        assert np.array_equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(size: float, isa: str) -> None:
    layout, data, weights = packed(Form("int4", 32), normal(20, 64))
    x = (size * normal(2, 64)).numpy()
    got = product(layout, data, x, "int8", 20)
    want = x.astype(np.float64) @ weights.T
    assert np.max(np.abs(got - want)) <= 0.05 * size * 64 + 1e-34


def test_strided_rows_are_taken_as_they_lie() -> None:
    layout, data, weights = packed(Form("int8"), normal(20, 40))
    wide = normal(6, 100).numpy()
    x = wide[::2, 30:70]
    out = np.full((3, 50), np.nan, np.float32)
    _core.multiply(layout, data, x, "float", out[:, 10:30])
    assert np.allclose(out[:, 10:30], x @ weights.T, rtol=1e-4, atol=1e-4)
    assert np.isnan(out[:, :10]).all()
    assert np.isnan(out[:, 30:]).all()


def test_no_tokens_give_nothing() -> None:
    layout, data, _ = packed(Form("int4", 32), normal(20, 40))
    assert product(layout, data, np.zeros((0, 40), np.float32), "int8", 20).shape == (0, 20)


def test_names_what_does_not_fit() -> None:
    layout, data, _ = packed(Form("bf16"), normal(20, 40))
    x, out = np.zeros((2, 40), np.float32), np.zeros((2, 20), np.float32)
    with pytest.raises(ValueError, match=r"x.shape\[1\]: got 39, expected 40"):
        _core.multiply(layout, data, x[:, :39], "float", out)
    with pytest.raises(ValueError, match=r"out.shape\[0\]: got 1, expected 2"):
        _core.multiply(layout, data, x, "float", out[:1])
    with pytest.raises(ValueError, match="compute: got int8, expected float or mixed with bf16"):
        _core.multiply(layout, data, x, "int8", out)
    with pytest.raises(ValueError, match="compute: got fp8"):
        _core.multiply(layout, data, x, "fp8", out)
    with pytest.raises(ValueError, match="packed: bytes: got"):
        _core.multiply(layout, data[:-64], x, "float", out)
    with pytest.raises(ValueError, match="packed: got memory that is not aligned"):
        _core.multiply(layout, aligned(data.size + 1)[1:], x, "float", out)
    with pytest.raises(ValueError, match="x: got a strided last axis"):
        _core.multiply(layout, data, np.zeros((2, 80), np.float32)[:, ::2], "float", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int2", 16, 32), "format: got int2"),
        (("bf16", 0, 32), "rows: got 0, expected 1 to"),
        (("bf16", 16, 1 << 40), "inputs: got 1099511627776"),
        (("int4", 16, 32, 48), "group: got 48, expected 32, 64 or 128"),
        (("int8", 16, 32, 32), "group: got 32, expected 0"),
        (("int8", 16, 32, 0, True), "zero_points: got 1, expected none"),
    ],
)
def test_refuses_a_layout_that_is_none(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Layout(*arguments)  # type: ignore[arg-type]


def test_names_a_code_or_scale_that_is_none() -> None:
    layout = _core.Layout("int4", 2, 32, 32)
    codes, scales, out = (
        np.zeros((2, 32), np.int8),
        np.ones((2, 1), np.float32),
        aligned(layout.bytes),
    )
    with pytest.raises(ValueError, match="codes: got 16, expected 0 to 15"):
        _core.pack_codes(layout, codes + np.int8(16), scales, None, out)
    with pytest.raises(ValueError, match="scales: got a number that is not finite"):
        _core.pack_codes(layout, codes, scales * np.float32(np.inf), None, out)
    with pytest.raises(ValueError, match="zero_points: got some, expected none"):
        _core.pack_codes(layout, codes, scales, np.zeros((2, 1), np.uint8), out)
    with pytest.raises(ValueError, match=r"scales.shape\[1\]: got 2, expected 1"):
        _core.pack_codes(layout, codes, np.ones((2, 2), np.float32), None, out)
    int8 = _core.Layout("int8", 2, 32)
    with pytest.raises(ValueError, match="codes: got -128, expected -127 to 127"):
        _core.pack_codes(int8, np.full((2, 32), -128, np.int8), scales, None, aligned(int8.bytes))


@pytest.mark.parametrize("form", [form for form in FORMS if form.format != "bf16"], ids=str)
def test_integer_products_are_the_same_bits_at_every_wide_level(form: Form) -> None:
    levels = [level for level in _core.isas() if level.startswith("avx512")]
    before = _core.isa()
    for outputs, inputs in ((17, 33), (50, 545), (33, 1030)):
        layout, data, _ = packed(form, normal(outputs, inputs))
        for tokens in (1, 5, 6, 7, 15, 16, 17, 31, 48, 63, 64, 65, 81, 130):
            x = normal(tokens, inputs, seed=tokens).numpy()
            results = []
            for level in levels:
                _core.set_isa(level)
                results.append(product(layout, data, x, "int8", outputs))
            _core.set_isa(before)
            for level, got in zip(levels, results, strict=True):
                assert np.array_equal(got, results[0]), (level, outputs, inputs, tokens)
