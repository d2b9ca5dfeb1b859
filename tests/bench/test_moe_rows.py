"""The rows and figures of experts: what is promised exists, and peers get the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quernstone.bench import bench_moe_routing as routing
from quernstone.bench import figures_moe
from quernstone.bench.cases.experts import OF, Calls, ExpertCase, relative
from quernstone.bench.rivals import experts as rivals
from quernstone.bench.rivals import ik_llama
from quernstone.bench.tinylm import experts as tiny
from quernstone.quant import Scheme, quantize


def test_peers_get_the_same_experts_in_the_same_order() -> None:
    calls = Calls(ExpertCase("int4", 4, 1), count=5)
    one, other = calls.each(), calls.each()
    for _ in range(7):
        ids = one()
        assert torch.equal(ids, other())
        assert all(len(set(row)) == OF.top_k for row in ids.tolist())


def test_a_single_token_comes_back_to_an_expert_late() -> None:
    calls = Calls(ExpertCase("int4", 1, 1))
    seen: dict[int, int] = {}
    for at, ids in enumerate(calls.ids):
        for e in ids[0].tolist():
            assert at - seen.get(e, -100) >= 10
            seen[e] = at
    assert len(seen) == OF.experts


def test_the_bytes_of_a_call_count_an_expert_once() -> None:
    case = ExpertCase("int4", 1, 1)
    assert Calls(case).bytes(case.shape) == 6 * case.shape.expert_bytes
    crowd = ExpertCase("int4", 64, 1)
    assert Calls(crowd).bytes(crowd.shape) <= 64 * crowd.shape.expert_bytes


def test_kt_kernels_int4_is_packed_as_it_reads_it() -> None:
    """Two codes a byte, the first in the low half; the numbers are those of the quantiser."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1, 64, 64, generator=generator).bfloat16()
    narrow = torch.randn(1, 64, 32, generator=generator).bfloat16()
    (gates, _, _), (scales, _, _) = rivals.kt_weights(True, (wide, narrow))
    codes = torch.stack([gates[0] & 15, gates[0] >> 4], -1).flatten(1).float() - 8
    got = (codes.view(32, 2, 32) * scales[0].float()[:, :, None]).view(32, 64)
    scheme = Scheme(4, True, "group", 32, "bf16", full_range=True)
    assert torch.equal(got, quantize(wide[0, :32], scheme).dequantize())


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("repack", [False, True])
def test_ik_llama_chooses_and_computes_the_same_experts(
    tmp_path: Path, kind: ik_llama.Kind, repack: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(8, 512, 256, generator=generator).mul_(256**-0.5)
    narrow = torch.randn(8, 256, 256, generator=generator).mul_(256**-0.5)
    path = tmp_path / "layer.gguf"
    model = ik_llama.write_one_layer(path, wide, narrow, kind)
    for top_k in (1, 3):
        session = ik_llama.Session(path, threads=1, top_k=top_k, repack=repack)
        got = torch.from_numpy(session.step([7]))
        session.close()
        want = ik_llama.first_logits(
            model, lambda e: (*wide[e].chunk(2), narrow[e]), token=7, top_k=top_k
        )
        assert relative(got, want) <= ik_llama.TOLERANCE[kind]


def test_ik_llama_says_that_it_cannot_load_a_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"cannot load broken\.gguf"):
        ik_llama.Session(tmp_path / "broken.gguf", threads=1)


def test_gating_is_measured_on_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "CALIBRATED", 2)
    monkeypatch.setattr(routing, "VALIDATED", 4)
    model = tiny.load("top2of16")
    labels = torch.cat(list(tiny.batches(tiny.HELD_OUT)))[:12]
    found = routing.gated(model, labels, seed=0)
    assert 0 <= found.single <= 1
    assert found.active == pytest.approx(2 - found.single)
    assert abs(found.rise) < 0.05
    assert routing.gated(model, labels, seed=0) == found


def test_figures_stand_alone() -> None:
    trace = tiny.load_trace("top2of16")
    short = type(trace)(trace.experts, trace.ids[:, :300], trace.steps[:300], trace.scores[:, :300])
    curves = figures_moe.hit_curves({"a model": short})
    assert curves.startswith("<svg")
    assert "Belady" in curves
    picture = figures_moe.ratio_map()
    assert picture.startswith("<svg")
    assert "a6000-xeon10" in picture
