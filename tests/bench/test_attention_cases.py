"""The attention cases: counts of work, blocks of the reference, and rivals that are right."""

from dataclasses import replace

import pytest
import torch

from quernstone.attention import reference
from quernstone.bench import bench_attention
from quernstone.bench.cases.attention import (
    REFERENCE_ROWS,
    AttentionCase,
    Inputs,
    arguments,
    gradient_error,
    relative_error,
    sweep,
    trained,
)
from quernstone.bench.harness import Absent
from quernstone.bench.memory import peak_beyond
from quernstone.bench.rivals import attention as rivals

SMALL = AttentionCase("small", queries=70, keys=70, width=16, heads=4, kv_heads=2)
MASKS = [
    {},
    {"causal": False},
    {"window": 9},
    {"window": 9, "causal": False},
    {"queries": 3},
    {"queries": 3, "window": 5},
    {"queries": 90},
]


@pytest.mark.parametrize("mask", MASKS)
def test_useful_work_counts_the_visible_pairs(mask: dict[str, int]) -> None:
    case = replace(SMALL, **mask)
    seen = reference.visible(case.queries, case.keys, causal=case.causal, window=case.window)
    assert case.visible_pairs == int(seen.sum())
    assert case.flops == 4 * 16 * 4 * int(seen.sum())


@pytest.mark.parametrize("kind", ["sink", "vanilla", "gated"])
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 37}])
def test_blocks_of_the_reference_are_the_reference(kind: str, mask: dict[str, int]) -> None:
    rows = 2 * REFERENCE_ROWS + 11
    case = replace(SMALL, kind=kind, queries=rows, keys=rows + 5, **mask)
    x = case.inputs()
    whole = reference.sink_attention(x.q, x.k, x.v, **arguments(case, x))
    assert isinstance(whole, torch.Tensor)
    assert relative_error(case.expected(), whole) < 1e-12


def test_inputs_are_the_same_every_time() -> None:
    for one, two in zip(SMALL.inputs(), SMALL.inputs(), strict=True):
        assert torch.equal(one, two)


def test_deviation_scales_the_logits() -> None:
    case = replace(SMALL, deviation=10.0, queries=400, keys=400, width=64)
    x = case.inputs()
    logits = x.q @ x.k.repeat_interleave(2, 1).mT / case.width**0.5
    assert float(logits.std()) == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_rival_computes_the_function(dtype: str, kv_heads: int) -> None:
    case = replace(SMALL, dtype=dtype, kv_heads=kv_heads)
    for rival in rivals.all_of(case, case.inputs()):
        assert not isinstance(rival, Absent), rival
        assert rival.check.error(rival.run()) <= rival.check.tolerance, rival.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_rival_computes_the_gradients(dtype: str, kv_heads: int) -> None:
    case = replace(SMALL, dtype=dtype, kv_heads=kv_heads)
    for rival in rivals.steps(case, case.inputs()):
        assert not isinstance(rival, Absent), rival
        for _ in range(2):
            assert rival.check.error(rival.run()) <= rival.check.tolerance, rival.name


@pytest.mark.parametrize("balance", [0.0, 1e3])
@pytest.mark.parametrize("kind", ["sink", "gated"])
def test_gradients_of_blocks_are_those_of_the_whole(kind: str, balance: float) -> None:
    rows = REFERENCE_ROWS + 11
    case = replace(SMALL, kind=kind, queries=rows, keys=rows + 5)
    x = Inputs(*(tensor.double() for tensor in case.inputs()))
    wanted = trained(case, x)
    result = reference.sink_attention(x.q, x.k, x.v, return_aux=True, **arguments(case, x))
    out, aux = result
    loss = (out * case.incoming().double()).sum()
    mean = aux.importance.mean()
    loss = loss + balance * (aux.importance / mean - 1).square().sum()
    gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    assert gradient_error(gradients, case.expected_gradients(balance=balance)) < 1e-12


def test_a_check_of_gradients_refuses_a_lost_term() -> None:
    case = replace(SMALL, kind="gated")
    gradients = dict(case.expected_gradients())
    check = rivals.gradient_check(case)
    assert check.error(gradients) == 0.0
    gradients["gate"] = 1.001 * gradients["gate"]
    assert check.error(gradients) > check.tolerance


def test_a_check_refuses_another_sink() -> None:
    x = SMALL.inputs()
    rival = rivals.hugging_face_eager(SMALL, x._replace(sinks=x.sinks + 0.01))
    assert not isinstance(rival, Absent)
    assert rival.check.error(rival.run()) > rival.check.tolerance


def test_an_absent_package_is_a_rival_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(rivals.importlib, "import_module", nothing)
    absent = rivals.onnx_runtime(SMALL, SMALL.inputs())
    assert isinstance(absent, Absent)
    assert "pip install 'quernstone[attention]'" in absent.why


def test_ids_tell_type_width_heads_and_threads() -> None:
    ids = [case.id for case in sweep("attention.forward", "fp32")]
    assert ids[0] == "attention.forward.fp32.causal.d64.s2048.t1"
    assert "attention.forward.fp32.causal.d128.s2048.kv2.t2" in ids
    assert len(set(ids)) == 8


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    factory = f"{bench_attention.__name__}:memory_call"
    peak = peak_beyond(factory, name="ours", threads=1, queries=300, keys=300, width=16)
    assert 0 <= peak < 50e6


def test_a_failed_memory_probe_gives_its_reason() -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        peak_beyond("no_such_module:call")
