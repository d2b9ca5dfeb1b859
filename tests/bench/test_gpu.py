"""The rows of a CUDA device, made on the CPU: all but the device and its figures is the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quernstone.bench import targets
from quernstone.bench.cases.attention import AttentionCase, Inputs
from quernstone.bench.gpu import __main__ as command
from quernstone.bench.gpu import attention, moe
from quernstone.bench.gpu.rivals import GpuRival, flash_attention_4, sdpa
from quernstone.bench.harness import Absent
from quernstone.bench.rows import Row

CPU = torch.device("cpu")
SMALL = AttentionCase(
    attention.FORWARD,
    dtype="bf16",
    heads=4,
    kv_heads=2,
    queries=70,
    keys=70,
    width=32,
)
MATH = sdpa("SDPA math", "MATH")


def row(case: AttentionCase, *offers: object) -> Row:
    (found,) = attention.measure([case], CPU, offers, rounds=2)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", [attention.FORWARD, attention.STEP])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_compares_then_times(name: str, batch: int) -> None:
    found = row(replace(SMALL, id=name, batch=batch), MATH)
    assert found.ours is not None
    assert found.ours > 0
    assert found.error is not None
    assert 0 < found.error < 1e-2
    assert found.limit is not None
    assert found.rivals["SDPA math"].ratio is not None
    assert found.ratio == found.rivals["SDPA math"].ratio
    flops = SMALL.flops * batch
    assert found.work["operations"] == flops * (3.5 if name == attention.STEP else 1)


def test_a_windowed_row_has_no_rival_without_windows() -> None:
    assert row(replace(SMALL, window=9), MATH).rivals == {}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attention.sink_attention

    def off(*tensors: Tensor, **keywords: object) -> tuple[Tensor, object]:
        out, aux = ours(*tensors, **keywords)
        return 1.1 * out, aux

    monkeypatch.setattr(attention, "sink_attention", off)
    found = row(SMALL, MATH)
    assert found.ours is None
    assert "wrong" in found.notes[0]


def test_a_rival_that_is_wrong_fails_or_is_absent_says_so() -> None:
    def wrong(_case: AttentionCase, _device: torch.device) -> GpuRival:
        return GpuRival("wrong", lambda x: x.q, plain=False)

    def broken(_case: AttentionCase, _device: torch.device) -> GpuRival:
        def forward(_x: Inputs) -> Tensor:
            raise RuntimeError("no such kernel")

        return GpuRival("broken", forward, plain=False)

    found = row(SMALL, wrong, broken, lambda *_: Absent("away", "pip install away"))
    assert "error" in str(found.rivals["wrong"].absent)
    assert "no such kernel" in str(found.rivals["broken"].absent)
    assert found.rivals["away"].absent == "pip install away"
    assert found.ours is not None


def test_an_absent_package_is_named_with_its_command() -> None:
    offer = flash_attention_4(SMALL, CPU)
    assert isinstance(offer, Absent)
    assert "pip install" in offer.why


def test_every_promise_has_its_row() -> None:
    contract = targets.load(command.TARGETS)
    ids = [case.id for case in (*attention.cases(), *moe.cases())]
    assert targets.unknown(contract, ids) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_device_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert command.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
