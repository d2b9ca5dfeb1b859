"""The public experts: packed, computed with, written to a file and read again."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import OlmoeConfig, Qwen2MoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from quernstone import moe
from quernstone.moe import Experts, ExpertsShape, ExpertsWriter, load_experts, reference, route
from quernstone.moe import save_experts as save
from quernstone.moe.torch_op import operands
from quernstone.quant import Scheme, quantize

SHAPES = [
    ExpertsShape(3, 48, 40, "bf16", 0),
    ExpertsShape(3, 48, 40, "int8", 0),
    ExpertsShape(3, 64, 40, "int4", 32),
    ExpertsShape(3, 64, 96, "int4", 64, True),
]


def weights_of(shape: ExpertsShape, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape.count, 2 * shape.intermediate, shape.hidden, generator=generator)
    narrow = torch.randn(shape.count, shape.hidden, shape.intermediate, generator=generator)
    return wide / 8, narrow / 8


def packed(shape: ExpertsShape, seed: int = 0) -> Experts:
    return Experts.pack(
        *weights_of(shape, seed),
        format=shape.format,
        group=shape.group,
        zero_points=shape.zero_points,
    )


def tokens(shape: ExpertsShape, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, shape.hidden, generator=generator)
    ids, weights = route(torch.randn(count, shape.count, generator=generator), 2)
    return x, ids, weights


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.format}-{s.group}-{s.zero_points}")
def test_packed_experts_are_those_of_their_matrices(shape: ExpertsShape) -> None:
    experts = packed(shape)
    matrices = [experts.matrices(e) for e in range(shape.count)]
    x, ids, weights = tokens(shape)
    want = reference.experts(matrices, x, ids, weights)
    got = experts(x, ids, weights, compute="float")
    assert float((got - want).norm() / want.norm()) <= 2e-6
    narrow = experts(x.bfloat16(), ids, weights, compute="float")
    assert narrow.dtype == torch.bfloat16
    assert float((narrow - want).norm() / want.norm()) <= 2 * 2**-8


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.format}-{s.group}-{s.zero_points}")
def test_matrices_are_the_quantisers(shape: ExpertsShape) -> None:
    experts = packed(shape)
    gate_up, down = weights_of(shape)
    for e in range(shape.count):
        given = (*gate_up[e].chunk(2), down[e])
        for got, weight in zip(experts.matrices(e), given, strict=True):
            if shape.scheme is None:
                assert torch.equal(got, weight.bfloat16().float())
            else:
                # A product of bf16 scale and code in fp32 is one rounding either way.
                want = quantize(weight, shape.scheme, clips=4).dequantize()
                torch.testing.assert_close(got, want, rtol=2e-7, atol=0)


def test_takes_what_is_quantised_already() -> None:
    shape = ExpertsShape(1, 64, 32)
    gate_up, down = weights_of(shape)
    assert shape.scheme is not None
    parts = [quantize(m, shape.scheme, clips=20) for m in (*gate_up[0].chunk(2), down[0])]
    ours = Experts.empty(shape)
    ours.place(0, *parts)
    theirs = Experts.pack(gate_up, down, clips=20)
    assert np.array_equal(ours.data, theirs.data)
    with pytest.raises(ValueError, match=r"gate\.scheme"):
        ours.place(0, quantize(gate_up[0][:32], Scheme(4)), *parts[1:])


def test_a_layer_is_olmoes() -> None:
    config = OlmoeConfig(hidden_size=64, intermediate_size=48, num_experts=8, num_experts_per_tok=3)
    torch.manual_seed(0)
    block = OlmoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_((parameter.normal_() / 8).bfloat16().float())
        x = torch.randn(11, 64)
        theirs = block(x.unsqueeze(0))
        theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).squeeze(0)
        ids, weights = route(x @ block.gate.weight.T, 3, renormalize=config.norm_topk_prob)
        ours = Experts.pack(block.experts.gate_up_proj, block.experts.down_proj, format="bf16")(
            x, ids, weights
        )
    assert float((ours - theirs).norm() / theirs.norm()) <= 2e-6


def test_experts_are_qwens() -> None:
    config = Qwen2MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=6)
    torch.manual_seed(0)
    theirs = Qwen2MoeExperts(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_((parameter.normal_() / 8).bfloat16().float())
        x = torch.randn(9, 64)
        ids, weights = route(torch.randn(9, 6), 2)
        want = theirs(x, ids, weights)
        got = Experts.pack(theirs.gate_up_proj, theirs.down_proj, format="bf16")(x, ids, weights)
    assert float((got - want).norm() / want.norm()) <= 2e-6


@pytest.mark.parametrize("memory", ["map", "copy", "huge"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, memory: moe.Memory) -> None:
    path = tmp_path / "experts"
    layers = {f"layer {i}": packed(shape, i) for i, shape in enumerate(SHAPES)}
    save(path, layers)
    found = load_experts(path, memory=memory)
    assert list(found) == list(layers)
    for name, experts in layers.items():
        assert found[name].shape == experts.shape
        assert np.array_equal(found[name].data, experts.data)
        x, ids, weights = tokens(experts.shape)
        assert torch.equal(found[name](x, ids, weights), experts(x, ids, weights))


def test_a_mapped_file_cannot_be_written_through(tmp_path: Path) -> None:
    save(tmp_path / "experts", {"a": packed(SHAPES[0])})
    experts = load_experts(tmp_path / "experts", memory="map")["a"]
    with pytest.raises(ValueError, match="read-only"):
        experts.place(0, *experts.matrices(0))


def test_names_a_damaged_byte_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    save(path, {"first": packed(SHAPES[1]), "second": packed(SHAPES[2])})
    whole = path.read_bytes()
    ends = [experts.data.size for experts in load_experts(path).values()]
    places = [0, 9, 13, 20, 28, 4096, 4096 + ends[0] - 1, len(whole) - 3]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        for memory in ("map", "copy", "huge"):
            with pytest.raises(ValueError, match=str(path)):
                load_experts(path, memory=memory)


@pytest.mark.parametrize("memory", ["map", "copy", "huge"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offset": 4096.0}, "offset: got 4096.0, expected a whole number"),
        ({"offset": "%"}, "offset: got '%'"),
        ({"offset": -4096}, "offset: got -4096"),
        ({"crc32": None}, "crc32: got None"),
        ({"shape": {}}, "missing"),
        (None, "recursion"),
    ],
)
def test_an_index_that_was_forged_is_refused(
    tmp_path: Path, change: dict[str, Any] | None, says: str, memory: moe.Memory
) -> None:
    """Its checksum is right."""
    path = tmp_path / "experts"
    save(path, {"a": packed(SHAPES[1])})
    whole = path.read_bytes()
    offset = int.from_bytes(whole[16:24], "little")
    if change is None:
        index = b"[" * 100_000
    else:
        entry = json.loads(whole[offset:])["layers"]["a"]
        index = json.dumps({"layers": {"a": entry | change}}).encode()
    head = struct.pack("<IQQ", zlib.crc32(index), offset, len(index))
    path.write_bytes(whole[:12] + head + whole[32:offset] + index)
    with pytest.raises(ValueError, match=f"{path}: index: .*{says}"):
        load_experts(path, memory=memory)


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_names_a_file_that_is_cut_short(share: float) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"quernstone-cut-{os.getpid()}"
    try:
        save(path, {"a": packed(SHAPES[1])})
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"expected|no file of packed experts"):
            load_experts(path)
    finally:
        path.unlink(missing_ok=True)


def test_a_file_stays_as_it_is_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    save(path, {"a": packed(SHAPES[0])})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="experts: got str"):
        save(path, {"a": packed(SHAPES[0]), "b": "nothing"})  # type: ignore[dict-item]
    with contextlib.suppress(KeyboardInterrupt), ExpertsWriter(path) as writer:
        writer.add("c", packed(SHAPES[1]))
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["experts"]


def test_names_what_cannot_be_packed() -> None:
    gate_up, down = weights_of(SHAPES[2])
    with pytest.raises(ValueError, match=r"down.shape: got \(3, 64, 39\), expected \(3, 64, 40\)"):
        Experts.pack(gate_up, down[:, :, 1:])
    with pytest.raises(ValueError, match=r"gate_up.shape\[1\]: got 79, expected an even number"):
        Experts.pack(gate_up[:, 1:], down)
    with pytest.raises(TypeError, match=r"gate_up: got torch\.int64"):
        Experts.pack(gate_up.long(), down)
    with pytest.raises(ValueError, match="group: got 32 with 'int8', expected 0"):
        Experts.pack(gate_up, down, format="int8", group=32)
    with pytest.raises(ValueError, match="format: got 'fp4'"):
        Experts.pack(gate_up, down, format="fp4")  # type: ignore[arg-type]
    for format in ("bf16", "int8", "int4"):
        bad = gate_up.clone()
        bad[1, 7, 3] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            Experts.pack(bad, down, format=format)


def test_weights_that_bf16_does_not_hold_are_refused() -> None:
    experts = packed(SHAPES[0])
    gate, up, down = experts.matrices(0)
    with pytest.raises(ValueError, match="gate: got a weight that is not finite in bf16"):
        experts.place(0, gate * 0 + 3.4e38, up, down)
    with pytest.raises(TypeError, match=r"up.dtype: got torch.complex64"):
        experts.place(0, gate, up.to(torch.complex64), down)
    with pytest.raises(ValueError, match=r"down.device: got meta"):
        experts.place(0, gate, up, down.to("meta"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_computes_the_same_from_memory_of_its_own(
    copied: Callable[[Experts], Experts],
) -> None:
    experts = packed(SHAPES[2])
    x, ids, weights = tokens(SHAPES[2])
    want = experts(x, ids, weights)
    other = copied(experts)
    experts.data[:] = 0
    assert torch.equal(other(x, ids, weights), want)


@pytest.mark.parametrize("name", ["count", "hidden", "intermediate", "group"])
def test_a_size_beyond_every_machine_is_refused_by_name(name: str) -> None:
    for size in (-1, 2**40, 10**30):
        fields = {"count": 1, "hidden": 64, "intermediate": 64, "group": 32, name: size}
        with pytest.raises(ValueError, match=f"{name}: got {size}, expected"):
            ExpertsShape(**fields)


def test_names_what_cannot_be_computed() -> None:
    experts = packed(SHAPES[0])
    x, ids, weights = tokens(SHAPES[0])
    with pytest.raises(TypeError, match=r"x.dtype: got torch.float64"):
        experts(x.double(), ids, weights)
    with pytest.raises(TypeError, match=r"ids.dtype: got torch.int32"):
        experts(x, ids.int(), weights)
    with pytest.raises(ValueError, match=r"x.ndim: got 3, expected 2"):
        experts(x[None], ids, weights)
    with pytest.raises(ValueError, match="ids: got 3, expected -1 to 2"):
        experts(x, ids.clamp(min=0) * 0 + torch.tensor([3, 0]), weights)
    with pytest.raises(ValueError, match="compute: got 'int8' with bf16 weights"):
        experts(x, ids, weights, compute="int8")
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weights: got a number that is not finite"):
            experts(x, ids, torch.where(ids == ids[2, 1], bad, weights))
    for logit in (torch.nan, 1e300):
        with pytest.raises(ValueError, match="logits: got a number that is not finite"):
            route(torch.tensor([[1.0, logit]], dtype=torch.float64), 1)
    with pytest.raises(TypeError, match="logits: got list"):
        route([[1.0]], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k: got 3, expected 1 to 2"):
        route(torch.zeros(1, 2), 3)


def test_the_operator_reads_no_bytes_but_those_of_its_tensor() -> None:
    experts = packed(SHAPES[2])
    x, ids, weights = tokens(SHAPES[2])
    data, settings = operands(experts)
    operator = torch.ops.quernstone.moe_experts.default
    assert torch.equal(operator(x, ids, weights, data, settings), experts(x, ids, weights))
    nothing = torch.zeros(1, dtype=torch.uint8).expand(experts.shape.nbytes)
    for strided in (nothing, data.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="packed: got a strided tensor, expected a contiguous"):
            operator(x, ids, weights, strided, settings)
    for other in (torch.int8, torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"packed.dtype: got {other}, expected torch.uint8"):
            operator(x, ids, weights, data.to(other), settings)
    with pytest.raises(ValueError, match=r"packed.shape\[0\]: got \d+, expected a multiple of"):
        operator(x, ids, weights, data[:-64], settings)


def test_data_has_to_be_of_the_shape() -> None:
    shape = SHAPES[1]
    good = packed(shape).data
    with pytest.raises(ValueError, match=r"data.shape"):
        Experts(shape, good[:-64])
    with pytest.raises(TypeError, match="data: got int8"):
        Experts(shape, good.view(np.int8))  # type: ignore[arg-type]
    wide = np.zeros(shape.nbytes + 128, np.uint8)
    skip = (-wide.ctypes.data % 64) + 1
    with pytest.raises(ValueError, match="not aligned"):
        Experts(shape, wide[skip : skip + shape.nbytes])
