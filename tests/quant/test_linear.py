"""Packed linear layers beside torch's own with the weights that they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quernstone.quant import MatrixShape, PackedLinear, PackedMatrix, Scheme, quantize

SHAPES = [(1, 1), (16, 32), (17, 33), (48, 96), (31, 130)]
FORMATS: list[dict[str, Any]] = [
    {"format": "bf16"},
    {"format": "int8"},
    {"format": "int4"},
    {"format": "int4", "group": 64, "zero_points": True},
]


def linear(outputs: int, inputs: int, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(outputs + inputs)
    made = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * inputs**-0.5)
    return made.requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", FORMATS)
def test_is_the_linear_layer_of_its_weights(
    shape: tuple[int, int], settings: dict[str, Any]
) -> None:
    plain = linear(*shape)
    packed = PackedLinear.of(plain, compute="float", **settings)
    plain.weight.copy_(packed.matrix.unpack())
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(0))
    want = plain.double()(x.double())
    # fp32 sums of `inputs` products, each below 2 in magnitude on average.
    bound = 2**-23 * 4 * (shape[1] + 8)
    assert packed(x).shape == (2, 3, shape[0])
    assert float((packed(x) - want).abs().max()) < bound
    half = packed(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", FORMATS[1:])
def test_rounds_activations_to_eight_bits_unless_told(settings: dict[str, Any]) -> None:
    from quernstone.moe.reference import rounded_to_int8

    plain = linear(48, 96, bias=False)
    packed = PackedLinear.of(plain, **settings)
    assert packed.compute == "int8"
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    want = rounded_to_int8(x) @ packed.matrix.unpack().double().T
    assert float((packed(x) - want).abs().max()) < 1e-4


def test_rows_are_matrices_in_the_same_memory() -> None:
    whole = PackedMatrix.pack(linear(40, 64).weight)
    first, last = whole.rows(0, 16), whole.rows(16, 40)
    assert torch.equal(torch.cat([first.unpack(), last.unpack()]), whole.unpack())
    assert first.whole is whole
    assert np.shares_memory(first.data, whole.data)
    for begin, end in ((0, 8), (8, 40), (16, 16), (0, 41), (-16, 16)):
        with pytest.raises(ValueError, match="rows: got"):
            whole.rows(begin, end)


def test_copies_and_pickles_are_aligned_and_equal() -> None:
    layer = PackedLinear.of(linear(20, 40))
    x = torch.randn(3, 40)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.matrix.data.ctypes.data % 64 == 0
        assert torch.equal(other(x), layer(x))


def test_takes_what_is_quantised_already() -> None:
    weight = linear(20, 64).weight
    scheme = Scheme(4, True, "group", 32, "bf16", full_range=True)
    made = quantize(weight, scheme)
    assert torch.equal(PackedMatrix.pack(made).unpack(), made.dequantize())
    with pytest.raises(ValueError, match=r"weight\.scheme"):
        PackedMatrix.pack(made, format="int8")
    with pytest.raises(TypeError, match="expected a Tensor for bf16"):
        PackedMatrix.pack(made, format="bf16")


def test_names_what_is_wrong() -> None:
    weight = linear(20, 64).weight
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "format: got 'fp4'", lambda: PackedMatrix.pack(weight, format="fp4")),  # type: ignore[arg-type]
        (ValueError, r"weight\.ndim: got 1", lambda: PackedMatrix.pack(weight[0])),
        (TypeError, "weight: got list", lambda: PackedMatrix.pack([1])),  # type: ignore[arg-type]
        (ValueError, "group: got 32 with 'int8'", lambda: MatrixShape(4, 4, "int8", 32)),
        (TypeError, "outputs: got True", lambda: MatrixShape(True, 4)),
        (ValueError, "outputs", lambda: MatrixShape(-1, 4)),
        (TypeError, "zero_points: got 1", lambda: MatrixShape(4, 4, zero_points=1)),  # type: ignore[arg-type]
        (ValueError, "finite", lambda: PackedMatrix.pack(weight * torch.inf, format="bf16")),
        (TypeError, "data: got float64", lambda: PackedMatrix(MatrixShape(4, 4), np.zeros(4))),  # type: ignore[arg-type]
        (
            ValueError,
            r"data\.shape: got \(4,\)",
            lambda: PackedMatrix(MatrixShape(4, 4), np.zeros(4, np.uint8)),
        ),
    ]
    for kind, words, call in wrong:
        with pytest.raises(kind, match=words):
            call()
    layer = PackedLinear.of(linear(20, 64))
    with pytest.raises(ValueError, match=r"x\.shape\[1\]: got 63"):
        layer(torch.ones(2, 63))
    with pytest.raises(TypeError, match=r"x\.dtype: got torch\.float64"):
        layer(torch.ones(2, 64).double())
    with pytest.raises(ValueError, match=r"x\.device: got meta"):
        layer.matrix(torch.ones(2, 64, device="meta"))
    with pytest.raises(ValueError, match=r"bias\.shape: got \(3,\)"):
        PackedLinear(layer.matrix, torch.ones(3))
    with pytest.raises(ValueError, match="compute: got 'int8' with bf16"):
        PackedLinear.of(linear(4, 4), format="bf16", compute="int8")
    assert "format=int4" in repr(layer)
