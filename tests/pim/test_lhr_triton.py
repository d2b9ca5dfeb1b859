"""The Triton kernels of the Hamming regulariser: interpreted on the CPU, and compiled for GPUs.

Whether kernels are interpreted is settled when they are imported, so a process of its own does it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

SHAPES = [(1,), (33,), (3, 5), (7, 128), (5, 2, 3, 3), (3, 4099)]
# fp32 sums of 4096 numbers in a tree; a factor that is rounded twice more.
VALUE, GRADIENT = 16 * 2.0**-24, 8 * 2.0**-24


def begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def errors(shape: tuple[int, ...], kind: str, bits: int, shift: int) -> tuple[float, float]:
    """Relative error of the mean, and of the gradients, against the CPU's operators."""
    from quernstone.pim import lhr, lhr_triton

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[..., 0] = weight.abs().max() * 2  # beyond the codes, with these scales
    group = 4 if kind == "group" and weight[0].numel() >= 4 else 0
    scales = lhr.symmetric_scales(
        weight / 2,
        bits=bits,
        granularity=kind if kind != "group" or group else "channel",  # type: ignore[arg-type]
        group=group,
    )
    table, run = lhr._table(weight, scales, bits, shift, group)
    dmean = torch.tensor(0.75)
    options = (table, run, bits, shift)
    want = lhr.hamming_mean(weight, *options)
    got = lhr_triton.hamming_mean(weight, *options)
    slopes = lhr.hamming_mean_backward(dmean, weight, *options)
    found = lhr_triton.hamming_mean_backward(dmean, weight, *options)
    scale = slopes.abs().max().clamp(min=1e-30)
    return abs(float(got / want) - 1), float(((found - slopes).abs() / scale).max())


def of_nan() -> tuple[bool, bool]:
    from quernstone.pim import lhr_triton

    weight = torch.tensor([[1.5, float("nan"), 2.5]])
    options = (torch.ones(1, 1), 3, 8, 0)
    mean = lhr_triton.hamming_mean(weight, *options)
    grad = lhr_triton.hamming_mean_backward(torch.tensor(1.0), weight, *options)
    return bool(mean.isnan()), bool(grad[0, [0, 2]].isfinite().all())


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, begin) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_give_what_the_cpu_gives(
    shape: tuple[int, ...], kind: str, interpreter: ProcessPoolExecutor
) -> None:
    for bits, shift in ((8, 0), (8, 16), (5, -3), (16, 9)):
        value, gradient = interpreter.submit(errors, shape, kind, bits, shift).result()
        assert value <= VALUE
        assert gradient <= GRADIENT


def test_nan_in_nan_out(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(of_nan).result() == (True, True)


def compiled(kernel: str, bits: int, single: bool, chip: int) -> tuple[int, int]:
    from quernstone.kernels.triton import ahead_of_time_pim as ahead

    return ahead.compile_for(ahead.Build(kernel, bits, single), chip)


@pytest.mark.parametrize("chip", [80, 90, 120])
def test_no_build_spills(chip: int, tmp_path: object) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        for kernel in ("forward", "backward"):
            for bits, single in ((8, True), (16, False)):
                registers, spilled = pool.submit(compiled, kernel, bits, single, chip).result()
                assert 0 < registers <= 128
                assert spilled == 0
