"""Fused experts equal the Mixture-of-Experts blocks of transformers, at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from quernstone import _core
from tests.gemm.cases import FORMS, Form, aligned, normal, packed

EXPERTS, HIDDEN, INTERMEDIATE = 5, 96, 72
Matrices = tuple[Tensor, Tensor, Tensor]
# Relative to the norm. fp32 sums of a hundred products, twice. Activations of 8 bits deviate by
# 1 / (127 sqrt 12) of the largest of 32, which of a token's numbers is about 2.3 deviations, of
# products of two such four: 0.005 in gate and up each, 0.009 in down, 0.012 in all, and 0.018 of a
# single token. Roundings to bf16 deviate by 2^-8 / sqrt 3 of a number at most, six in all.
FLOAT, INT8, TILES = 2e-6, 0.02, 2.0**-8 * 2**0.5


def experts(
    form: Form, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> tuple[_core.moe.ExpertsLayout, NDArray[np.uint8], list[Matrices]]:
    """Layout and bytes of a layer, and gate, up and down of each expert as its numbers are."""
    layout = _core.moe.ExpertsLayout(
        form.format, EXPERTS, hidden, intermediate, form.group, form.zero_points
    )
    data = aligned(layout.bytes)
    numbers = []
    for e in range(EXPERTS):
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        parts = [packed(form, normal(*s, seed=3 * e + i) / 8) for i, s in enumerate(shapes)]
        _core.moe.place_expert(layout, e, *(part[1] for part in parts), data)
        gate, up, down = (torch.from_numpy(part[2]) for part in parts)
        numbers.append((gate, up, down))
    return layout, data, numbers


def expected(numbers: list[Matrices], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for c in range(ids.shape[1]):
            if ids[t, c] >= 0:
                gate, up, down = numbers[int(ids[t, c])]
                token = x[t].double()
                inner = torch.nn.functional.silu(gate @ token) * (up @ token)
                out[t] += weights[t, c].double() * (down @ inner)
    return out


def forward(
    layout: _core.moe.ExpertsLayout,
    data: NDArray[np.uint8],
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    compute: str,
) -> Tensor:
    out = np.full(tuple(x.shape), np.nan, np.float32)
    _core.moe.experts_forward(layout, data, x.numpy(), ids.numpy(), weights.numpy(), compute, out)
    return torch.from_numpy(out)


def routed(tokens: int, choices: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    top = scores.topk(choices)
    return top.indices, top.values


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_are_those_of_their_numbers(form: Form, isa: str) -> None:
    for hidden, intermediate in ((HIDDEN, INTERMEDIATE), (33, 17), (16, 130)):
        layout, data, numbers = experts(form, hidden, intermediate)
        for tokens, choices in ((1, 1), (1, 5), (2, 2), (7, 3), (150, 2)):
            x = normal(tokens, hidden, seed=tokens)
            ids, weights = routed(tokens, choices)
            want = expected(numbers, x, ids, weights)
            for compute in form.computes:
                got = forward(layout, data, x, ids, weights, compute)
                bound = FLOAT if compute == "float" else INT8
                assert float((got - want).norm() / want.norm()) <= bound


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_of_many_tokens_and_of_few_are_told_apart_one_by_one(form: Form, isa: str) -> None:
    for hidden, intermediate in ((HIDDEN, INTERMEDIATE), (33, 17), (16, 530)):
        layout, data, numbers = experts(form, hidden, intermediate)
        x = normal(140, hidden, seed=3)
        # One expert has all tokens, one 63, one 64, one 7.
        ids = torch.full((140, 4), -1)
        ids[:, 0] = 2
        ids[:63, 1], ids[40:104, 2], ids[100:107, 3] = 0, 1, 4
        weights = torch.rand(140, 4, generator=torch.Generator().manual_seed(1))
        got = forward(layout, data, x, ids, weights, "mixed")
        want = expected(numbers, x, ids, weights)
        few = FLOAT if form.format == "bf16" else INT8
        many = TILES if isa == "avx512_amx" else few
        assert float((got - want).norm() / want.norm()) <= max(few, many)
        by_one = ids[:, 1:].max(1).values < 0  # of those, the expert with all tokens
        assert float((got - want)[by_one].norm() / want[by_one].norm()) <= many
        # An expert's rows depend on its own tokens alone, whatever else the call has.
        apart = torch.zeros_like(got)
        for c in (1, 2, 0, 3):  # in the order of the experts' numbers
            mine = ids[:, c] >= 0
            row = forward(
                layout, data, x[mine], ids[mine, c : c + 1], torch.ones(int(mine.sum()), 1), "mixed"
            )
            apart[mine] += weights[mine, c : c + 1] * row
        # Products with the weight may be fused with the sum or not.
        assert float((got - apart).abs().max()) <= 4 * 2.0**-23 * float(got.abs().max())
        if isa == "avx512_amx":
            few = forward(layout, data, x, ids, weights, form.computes[-1])
            alone = (ids[:, 1] >= 0).nonzero()[:20, 0]
            assert not torch.equal(got[alone], few[alone])


def test_a_layer_is_mixtrals(isa: str) -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=48,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_((parameter.normal_() / 8).bfloat16().float())
        x = normal(11, 64)
        theirs = block(x.unsqueeze(0))
        theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).squeeze(0)
        probabilities = (x @ block.gate.weight.T).softmax(-1)
    top = probabilities.topk(2)
    weights = top.values / top.values.sum(-1, keepdim=True)
    layout = _core.moe.ExpertsLayout("bf16", EXPERTS, 64, 48)
    data = aligned(layout.bytes)
    for e in range(EXPERTS):
        gate, up = block.experts.gate_up_proj[e].detach().chunk(2)
        parts = [
            packed(Form("bf16"), m.detach())[1] for m in (gate, up, block.experts.down_proj[e])
        ]
        _core.moe.place_expert(layout, e, *parts, data)
    ours = forward(layout, data, x, top.indices, weights.contiguous(), "float")
    assert float((ours - theirs).norm() / theirs.norm()) <= FLOAT


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_is_the_same_in_any_company_and_on_any_threads(form: Form, isa: str) -> None:
    layout, data, _ = experts(form)
    x = normal(13, HIDDEN)
    ids, weights = routed(13, 3)
    before = torch.get_num_threads()
    for compute in form.computes:
        whole = forward(layout, data, x, ids, weights, compute)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(forward(layout, data, x, ids, weights, compute), whole)
        torch.set_num_threads(before)
        for t in range(13):
            part = slice(t, t + 1)
            alone = forward(layout, data, x[part], ids[part], weights[part], compute)
            assert torch.equal(alone, whole[part])


def test_an_expert_that_is_elsewhere_adds_nothing() -> None:
    layout, data, numbers = experts(Form("int8"))
    x = normal(3, HIDDEN)
    ids = torch.tensor([[0, -1], [-1, -1], [2, 4]])
    weights = torch.ones(3, 2)
    got = forward(layout, data, x, ids, weights, "float")
    assert float((got - expected(numbers, x, ids, weights)).abs().max()) <= 1e-4
    assert not got[1].any()


def test_no_tokens_and_no_choices_give_nothing() -> None:
    layout, data, _ = experts(Form("int8"))
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert forward(layout, data, normal(0, HIDDEN), none, torch.zeros(0, 2), "int8").numel() == 0
    empty = torch.zeros(4, 0, dtype=torch.int64)
    assert not forward(layout, data, normal(4, HIDDEN), empty, torch.zeros(4, 0), "int8").any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[5, 0]], "ids: got 5, expected -1 to 4"),
        ([[-2, 0]], "ids: got -2, expected -1 to 4"),
        ([[3, 3]], "ids: an expert twice for one token: got 3"),
    ],
)
def test_names_an_id_that_is_none(ids: list[list[int]], message: str) -> None:
    layout, data, _ = experts(Form("int8"))
    with pytest.raises(ValueError, match=message):
        forward(layout, data, normal(1, HIDDEN), torch.tensor(ids), torch.ones(1, 2), "int8")


def test_names_the_shape_that_disagrees() -> None:
    layout, data, _ = experts(Form("int8"))
    ids, weights = routed(2, 2)
    with pytest.raises(ValueError, match=r"x.shape\[1\]: got 95, expected 96"):
        forward(layout, data, normal(2, HIDDEN - 1), ids, weights, "int8")
    with pytest.raises(ValueError, match=r"ids.shape\[0\]: got 1, expected 2"):
        forward(layout, data, normal(2, HIDDEN), ids[:1], weights, "int8")
    with pytest.raises(ValueError, match=r"weights.shape\[1\]: got 1, expected 2"):
        forward(layout, data, normal(2, HIDDEN), ids, weights[:, :1], "int8")
    with pytest.raises(ValueError, match="packed: bytes"):
        forward(layout, data[:-64], normal(2, HIDDEN), ids, weights, "int8")
    with pytest.raises(ValueError, match="experts: got 0, expected 1 to"):
        _core.moe.ExpertsLayout("bf16", 0, 16, 16)
    with pytest.raises(ValueError, match="index: got 5, expected 0 to 4"):
        _core.moe.place_expert(layout, 5, data, data, data, data)
