"""Codes go into bytes and come back; numbers come back within half a step."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from quernstone.quant import QTensor, Scheme, pack_bits, quantize, unpack_bits

schemes = st.builds(
    lambda bits, symmetric, granularity, group, scale, full: Scheme(
        bits,
        symmetric,
        granularity,
        group if granularity == "group" else 0,
        scale,
        full and symmetric,
    ),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(1, 40),
    st.sampled_from(["fp32", "bf16", "power-of-two", "two-shift"]),
    st.booleans(),
)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(st.integers(2, 8), st.binary(max_size=200))
def test_codes_come_back_from_their_bytes(bits: int, data: bytes) -> None:
    codes = torch.tensor([b % (1 << bits) for b in data], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == (len(data) * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, len(data)), codes)


@given(st.integers(2, 8), st.binary(min_size=1, max_size=64))
def test_bytes_are_those_of_numpy(bits: int, data: bytes) -> None:
    codes = np.array([b % (1 << bits) for b in data], np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little").ravel()
    want = np.packbits(stream, bitorder="little")
    assert np.array_equal(pack_bits(torch.from_numpy(codes), bits).numpy(), want)


@settings(deadline=None)
@given(schemes, shapes, st.integers(0, 2**31))
def test_codes_of_any_scheme_and_shape_come_back(
    scheme: Scheme, shape: tuple[int, ...], seed: int
) -> None:
    made = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), scheme)
    again = QTensor.from_codes(made.codes(), made.scales, made.zero_points, scheme=scheme)
    assert torch.equal(again.packed, made.packed)
    assert torch.equal(again.dequantize(), made.dequantize())
    assert again.dequantize().shape == shape


def test_names_the_part_that_does_not_fit() -> None:
    scheme = Scheme(4, granularity="group", group=4)
    good = quantize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), scheme)
    with pytest.raises(ValueError, match=r"packed.shape: got \(11,\), expected \(12,\)"):
        QTensor(scheme, (3, 8), good.packed[:-1], good.scales)
    with pytest.raises(ValueError, match=r"scales.shape: got \(3, 1\), expected \(3, 2\)"):
        QTensor(scheme, (3, 8), good.packed, good.scales[:, :1])
    with pytest.raises(TypeError, match=r"scales\.dtype"):
        QTensor(scheme, (3, 8), good.packed, good.scales.double())
    with pytest.raises(ValueError, match="zero_points: got some"):
        QTensor(scheme, (3, 8), good.packed, good.scales, good.scales.to(torch.uint8))
    with pytest.raises(ValueError, match="not finite and positive"):
        QTensor(scheme, (3, 8), good.packed, good.scales * float("nan"))
    with pytest.raises(ValueError, match="not finite and positive"):
        QTensor(scheme, (3, 8), good.packed, good.scales * 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_below_the_lowest_is_refused_in_bytes_too(bits: int) -> None:
    """2^bits - 1 codes leave one pattern of bits that is none."""
    scheme = Scheme(bits)
    packed = torch.full((bits,), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"packed: got the code {2 ** (bits - 1)}, expected"):
        QTensor(scheme, (1, 8), packed, torch.ones(1, 1))
    whole = QTensor(Scheme(bits, full_range=True), (1, 8), packed, torch.ones(1, 1))
    assert int(whole.codes().max()) == whole.scheme.highest


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("bf16", [1.0, 1.0078125, 2.0**-100], 1.00390625),
        ("power-of-two", [1.0, 2.0**-100, 2.0**100], 1.5),
        ("two-shift", [1.0, 1.5, 3.0, 1.00390625], 1.75),
        ("two-shift", [2.0**-100], 1.001953125),
    ],
)
def test_a_scale_of_another_kind_is_refused(kind: Any, good: list[float], bad: float) -> None:
    scheme = Scheme(4, scale=kind)
    for scale in good:
        QTensor(scheme, (1, 2), torch.zeros(1, dtype=torch.uint8), torch.tensor([[scale]]))
    with pytest.raises(ValueError, match=f"scales: got a number that '{kind}' does not hold"):
        QTensor(scheme, (1, 2), torch.zeros(1, dtype=torch.uint8), torch.tensor([[bad]]))


def test_names_the_code_that_is_none() -> None:
    scheme = Scheme(3, granularity="tensor")
    with pytest.raises(ValueError, match="codes: got -4 to 3, expected -3 to 3"):
        QTensor.from_codes(torch.tensor([-4, 3]), torch.ones(1, 1), scheme=scheme)
    with pytest.raises(ValueError, match="codes: got 8, expected 0 to 7"):
        pack_bits(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="bits: got 9, expected 2 to 8"):
        pack_bits(torch.zeros(0, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=f"bits: got {2**40}, expected 2 to 8"):
        pack_bits(torch.zeros(2, dtype=torch.uint8), 2**40)
    with pytest.raises(ValueError, match="count: got -1, expected 0 or more"):
        unpack_bits(torch.zeros(0, dtype=torch.uint8), 4, -1)


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        (Scheme(4), 16 * 32 // 2 + 16 * 4),
        (Scheme(4, granularity="group", group=16, scale="bf16"), 16 * 32 // 2 + 32 * 2),
        (Scheme(8, symmetric=False, granularity="tensor"), 16 * 32 + 5),
        (Scheme(3, scale="power-of-two"), 16 * 32 * 3 // 8 + 16),
    ],
)
def test_says_how_many_bytes_it_takes(scheme: Scheme, size: int) -> None:
    assert quantize(torch.ones(16, 32), scheme).nbytes == size
