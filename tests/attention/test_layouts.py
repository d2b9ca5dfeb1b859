"""Any strides, offsets and broadcasts of the inputs, which are read and never written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quernstone.attention import sink_attention

from .cases import DTYPES, KINDS, Case, check_call

Layout = Callable[[Tensor], Tensor]


def inside(x: Tensor, *shape: int) -> Tensor:
    """NaNs of a shape of x's type: whoever reads beside the tensor spoils the result."""
    return torch.full(shape, float("nan"), dtype=x.dtype)


def heads_after_positions(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, t, h, d).transpose(1, 2).copy_(x)


def off_by_one_element(x: Tensor) -> Tensor:
    return inside(x, x.numel() + 2)[1:-1].view(x.shape).copy_(x)


def part_of_longer_rows(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, h, t, d + 5)[..., 3 : d + 3].copy_(x)


def part_of_more_rows(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, h + 1, t + 7, d)[:, 1:, 4 : t + 4].copy_(x)


def every_second_channel(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, h, t, 2 * d)[..., 1::2].copy_(x)


def channels_before_positions(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, h, d, t).mT.copy_(x)


def every_third_row(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return inside(x, b, h, 3 * t, d)[:, :, 2::3].copy_(x)


LAYOUTS = [
    heads_after_positions,
    off_by_one_element,
    part_of_longer_rows,
    part_of_more_rows,
    every_second_channel,
    channels_before_positions,
    every_third_row,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [32, 65])
def test_strides_and_offsets_do_not_matter(
    isa: str, dtype: torch.dtype, layout: Layout, width: int
) -> None:
    for kind in KINDS:
        case = Case(kind=kind, dtype=dtype, ratio=2, queries=37, keys=101, width=width)
        (q, k, v), options = case.make()
        if kind == "gated by element":
            options["gate"] = layout(options["gate"])
        check_call(layout(q), layout(k), layout(v), label=str(case), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_input_has_its_own_strides(
    isa: str, dtype: torch.dtype, which: int, layout: Layout
) -> None:
    tensors, options = Case(dtype=dtype, ratio=3, queries=20, keys=50, width=64).make()
    changed = [layout(x) if i == which else x for i, x in enumerate(tensors)]
    check_call(changed[0], changed[1], changed[2], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_broadcast_axes_are_read_in_place(isa: str, dtype: torch.dtype, axis: int) -> None:
    (q, k, v), options = Case(dtype=dtype, key_heads=2, queries=33, keys=40).make()
    q, k, v = (x.narrow(axis, 0, 1).expand_as(x) for x in (q, k, v))
    # Equal channels add up: the logits are sqrt(d) times as large.
    check_call(q, k, v, logit_sd=32**0.5 if axis == 3 else 1.0, **options)


def test_small_arguments_may_be_strided_and_broadcast(isa: str) -> None:
    (q, k, v), options = Case(batch=3, queries=33, keys=40, padding="both").make()
    options["sinks"] = torch.stack([options["sinks"], torch.zeros(2)], dim=1)[:, 0]
    options["key_start"] = torch.tensor([7]).expand(3)
    options["key_lengths"] = torch.stack([options["key_lengths"]] * 2, dim=1)[:, 1]
    for mask in (torch.rand(33) < 0.5, torch.rand(3, 1) < 2, torch.rand(33, 3).mT < 0.5):
        check_call(q, k, v, **(options | {"token_mask": mask.expand(3, 33)}))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_gate_may_be_broadcast(isa: str, axis: int) -> None:
    for kind in ("gated", "gated by element"):
        (q, k, v), options = Case(kind=kind, key_heads=3, queries=33, keys=40).make()
        gate = options["gate"]
        options["gate"] = gate.narrow(axis, 0, 1).expand_as(gate)
        check_call(q, k, v, **options)


def test_one_tensor_may_be_queries_keys_and_values(isa: str) -> None:
    (q, _, _), options = Case(queries=50, keys=50).make()
    check_call(q, q, q, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_as_they_were(isa: str, kind: str) -> None:
    case = Case(kind=kind, queries=50, keys=50, padding="both", some_tokens=True)
    (q, k, v), options = case.make()

    def tensors() -> dict[str, Any]:
        named = {"q": q, "k": k, "v": v, **options}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    before = {name: x.clone() for name, x in tensors().items()}
    sink_attention(q, k, v, **options)
    for name, x in tensors().items():
        assert torch.equal(x, before[name]), name
