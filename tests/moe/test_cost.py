"""What experts cost: measured curves, published figures, files, and following a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quernstone.machine import Figure
from quernstone.moe import (
    MODELS,
    PRESETS,
    CostModel,
    Curve,
    ExpertsShape,
    profile_machine,
    schedule_layer,
)
from quernstone.moe import cost as module

SHAPE = ExpertsShape(4, 256, 128)
A6000 = PRESETS["a6000-xeon10"]


def model_of(**changes: object) -> CostModel:
    base = CostModel(
        SHAPE,
        cpu=Curve((1, 4, 8), (1.0, 1.0, 2.0)),
        gpu=Curve((1,), (0.5,)),
        cpu_first=0.25,
        transfer=2.0,
        cpu_source="measured",
        gpu_source="assumed",
    )
    return replace(base, **changes)


def test_a_curve_is_straight_between_and_beyond_its_points() -> None:
    curve = Curve((1, 4, 8), (1.0, 1.0, 2.0))
    assert curve([1, 2, 4, 6, 8, 16]).tolist() == [1.0, 1.0, 1.0, 1.5, 2.0, 4.0]
    # A single point is a price for each token.
    assert Curve((2,), (1.0,))([1, 2, 6]).tolist() == [1.0, 1.0, 3.0]
    # Noise does not make more tokens cheaper than fewer beyond the last point.
    assert Curve((1, 2), (2.0, 1.0))([4]).tolist() == [1.0]


def test_a_roofline_of_published_figures() -> None:
    """Mixtral's expert: 99.1 MB in int4, 352 MFLOP a token."""
    of = MODELS["mixtral-8x7b"]
    shape = ExpertsShape(of.experts, of.hidden, of.intermediate)
    model = CostModel.of_machine(A6000, shape)
    size, work = shape.expert_bytes, 6 * of.hidden * of.intermediate
    assert size == pytest.approx(99.1e6, rel=1e-3)
    assert model.transfer == pytest.approx(size / (0.8 * 31.5e9))
    read = size / (0.6 * 128e9)
    slow = work / 0.5e12
    loads = np.array([1, 2, 10, 1000])
    want = np.maximum(read, slow * loads)
    assert model.cpu_seconds(loads) == pytest.approx(want, rel=1e-9)
    assert float(model.gpu(1)) == pytest.approx(10e-6 + size / (0.8 * 768e9))
    assert model.cpu_source == model.gpu_source == "assumed"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_figure_of_a_preset_says_where_it_comes_from(name: str) -> None:
    for figure in PRESETS[name].figures.values():
        assert figure.source in ("published", "assumed")
        assert figure.note


def test_a_layer_has_the_costs_of_its_loads() -> None:
    model = model_of()
    layer = model.layer([1, 8], [True, False], gpu_free=3.0)
    assert layer.cpu.tolist() == [1.0, 2.0]
    assert layer.gpu.tolist() == [0.5, 4.0]
    assert (layer.cpu_first, layer.gpu_free) == (0.25, 3.0)
    assert schedule_layer(layer, "cpu_only").makespan == model.layer_seconds([1, 8]) == 3.25


def test_a_model_follows_the_machine() -> None:
    model = model_of()
    for _ in range(60):
        model = model.observed([1, 8], 6.5)
    assert model.layer_seconds([1, 8]) == pytest.approx(6.5, rel=0.01)
    assert model.cpu_seconds([4]) == pytest.approx([2.0], rel=0.01)
    assert model_of().observed([4], 2.5, rate=1.0).scale == pytest.approx(2.0)


def test_a_file_gives_back_the_model(tmp_path: Path) -> None:
    model = model_of(scale=1.5, note="here")
    model.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: got 'other'"),
        ({"version": 2}, "version: got 2"),
        ({"cpu_first": -1.0}, "cpu_first: got -1"),
        ({"cpu": {"tokens": [2, 1], "seconds": [1.0, 1.0]}}, "cpu.tokens: got"),
        ({"cpu": {"tokens": [1], "seconds": [0.0]}}, "cpu.seconds: got 0"),
        ({"cpu": {"tokens": ["1"], "seconds": [1.0]}}, "cpu.tokens: got"),
        ({"cpu": {"tokens": [1, 10**400], "seconds": [1.0, 1.0]}}, "cpu.tokens: got 1000.*2\\^53"),
        ({"gpu": {"tokens": [1]}}, "gpu.seconds: missing"),
        ({"shape": {}}, "shape.count: missing"),
        ({"gpu_source": "rumour"}, "gpu_source: got 'rumour'"),
        ({"more": 1}, "more: unknown"),
    ],
)
def test_names_what_is_wrong_in_a_file(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({**model_of().to_json(), **change}))
    with pytest.raises(ValueError, match=message):
        CostModel.load(path)


def test_refuses_figures_that_contradict() -> None:
    too_good = A6000.with_figures({"link.share": Figure(1.2, "1", "assumed")})
    with pytest.raises(ValueError, match=r"link.share is 1.2 1 \(assumed\), expected at most 1"):
        CostModel.of_machine(too_good, SHAPE)
    wrong_unit = A6000.with_figures({"gpu.rate": Figure(1.0, "GB/s", "assumed")})
    with pytest.raises(ValueError, match=r"gpu\.rate"):
        CostModel.of_machine(wrong_unit, SHAPE)


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [
        ("gpu.rate", 5e-324, "FLOP/s"),
        ("gpu.rate", 1e308, "TFLOP/s"),
        ("cpu.rate", 1e300, "FLOP/s"),
        ("cpu.read_bandwidth", 5e-324, "B/s"),
        ("gpu.read_share", 5e-324, "1"),
        ("link.bandwidth", 5e-324, "B/s"),
    ],
)
def test_names_the_machine_whose_figures_give_no_time(name: str, value: float, unit: str) -> None:
    odd = A6000.with_figures({name: Figure(value, unit, "assumed")})
    with pytest.raises(ValueError, match=f"machine 'a6000-xeon10': .*{name.split('.')[0]}"):
        CostModel.of_machine(odd, SHAPE)


def test_profiles_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COLD_BYTES", 1 << 20)
    model = profile_machine(SHAPE, gpu="h100", tokens=(1, 4, 64), rounds=3)
    assert model.cpu_source == "measured"
    assert model.gpu_source == "assumed"
    assert model.cpu.tokens == (1, 4, 64)
    assert model.transfer == CostModel.of_machine(PRESETS["h100"], SHAPE).transfer
    assert "h100" in model.note


def test_profiles_a_device() -> None:
    """The code that times a GPU, on the one device that every machine has."""
    curve, transfer = module._profile_device(SHAPE, (1, 4), 3, torch.device("cpu"))
    assert curve.tokens == (1, 4)
    assert transfer > 0


def test_cold_experts_are_more_than_a_cache_holds() -> None:
    experts = module.cold_experts(ExpertsShape(1, 1024, 1024))
    assert experts.shape.nbytes >= 256 << 20
    first, last = experts.matrices(0), experts.matrices(experts.shape.count - 1)
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_names_what_cannot_be_profiled() -> None:
    with pytest.raises(ValueError, match="rounds: got 2"):
        profile_machine(SHAPE, rounds=2)
    with pytest.raises(ValueError, match="gpu: got 'abacus', expected one of a6000"):
        profile_machine(SHAPE, gpu="abacus")
    with pytest.raises(ValueError, match="tokens: got"):
        profile_machine(SHAPE, gpu="h100", tokens=(4, 2))
    with pytest.raises(ValueError, match="rate: got 0"):
        model_of().observed([1], 1.0, rate=0.0)
    with pytest.raises(ValueError, match="loads: got none"):
        model_of().observed([], 1.0)
