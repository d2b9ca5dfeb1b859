"""Experts of other libraries, on the same weights, tokens and routings.

kt-kernel (of kTransformers) is asked for each of its classes of a format at one and at two
threads, and the fastest is the rival. bf16 weights are the same; int4 codes, which it takes
ready-made, are
rounded as its format's own tool does, in groups of 32 with bf16 scales.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quernstone.bench import machine
from quernstone.bench.cases.experts import (
    OF,
    Calls,
    ExpertCase,
    expected,
    layer_weights,
    relative,
)
from quernstone.bench.harness import Absent, Check, Rival
from quernstone.bench.rows import quantile
from quernstone.quant import Scheme, quantize

KT = "kt-kernel"
GET_KT = "pip install --no-deps kt-kernel==0.7.2"
# Of kt-kernel's extension module: those that a processor with AVX2 runs, by the flag they need.
CLASSES = {
    "bf16": {"AVX2BF16_MOE": "avx2"},
    "int8": {},
    "int4": {"AVX2RawInt4_MOE": "avx2", "AVXVNNI256RawInt4_MOE": "avx_vnni"},
}
# Relative to fp64 with the weights before they are rounded.
TOLERANCE = {"bf16": 0.02, "int4": 0.25}
# As compressed-tensors, whose files its int4 class reads, rounds by default: largest / 7.5 a step.
_KT_INT4 = Scheme(4, True, "group", 32, "bf16", full_range=True)
_TRIED = 9
_MOST_TOKENS = 512


def all_of(case: ExpertCase, calls: Calls) -> list[Rival | Absent]:
    return [kt_kernel(case, calls)]


def kt_kernel(case: ExpertCase, calls: Calls) -> Rival | Absent:
    """Its fastest class of the format at its better number of threads."""
    if machine.version(KT) is None:
        return Absent(KT, GET_KT)
    names = [name for name, flag in CLASSES[case.format].items() if flag in _flags()]
    if not names:
        return Absent(KT, f"no {case.format} class of it runs on this processor")
    timed = []
    for name in names:
        for threads in (1, 2):
            layer = kt_layer(name, threads)
            timed.append((_trial(layer, calls), name, threads))
    _, name, threads = min(timed)
    layer = kt_layer(name, threads)
    ids, run = calls.each(), functools.partial(layer.forward, calls.x, calls.weights)
    gate_up, down = layer_weights()
    want = expected(lambda e: (*gate_up[e].float().chunk(2), down[e].float()), calls)
    error = Check(lambda got: relative(got, want), TOLERANCE[case.format])
    version = f"{machine.version(KT)} {name}, {threads} threads"
    return Rival(KT, lambda: run(ids()), error, {KT: version})


class KtLayer:
    """A layer in one of kt-kernel's classes, and what its pointers point to."""

    def __init__(self, name: str, threads: int, weights: tuple[Tensor, Tensor]) -> None:
        with _no_greeting():
            self._build(name, threads, weights)

    def _build(self, name: str, threads: int, weights: tuple[Tensor, Tensor]) -> None:
        import kt_kernel

        ext = kt_kernel.kt_kernel_ext
        gate_up, _ = weights
        count, double, hidden = gate_up.shape
        pool = ext.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [threads]
        self._cpu = ext.CPUInfer(pool)
        self._mask = torch.zeros(count, dtype=torch.bool)
        config = ext.moe.MOEConfig(count, OF.top_k, hidden, double // 2, self._mask.data_ptr())
        config.layer_idx = 0
        config.pool = self._cpu.backend_
        config.max_len = _MOST_TOKENS
        self._weights, scales = kt_weights("Int4" in name, weights)
        for part, matrices, factors in zip(
            ("gate", "up", "down"), self._weights, scales, strict=True
        ):
            setattr(config, f"{part}_projs", [[x.data_ptr() for x in matrices]])
            setattr(config, f"{part}_scales", [[x.data_ptr() for x in factors] or [0] * count])
        if "Int4" in name:
            config.quant_config.bits = 4
            config.quant_config.group_size = 32
            config.quant_config.zero_point = False
        self._layer: Any = getattr(ext.moe, name)(config)
        self._order = torch.arange(count)
        self._cpu.submit(self._layer.load_weights_task(self._order.data_ptr()))
        self._cpu.sync()

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        count = torch.tensor([len(x)], dtype=torch.int32)
        pointers = (ids, weights, x, out)
        task = self._layer.forward_task(
            count.data_ptr(), ids.shape[1], *(p.data_ptr() for p in pointers), False
        )
        self._cpu.submit(task)
        self._cpu.sync()
        return out


@contextmanager
def _no_greeting() -> Iterator[None]:
    """Without what kt-kernel's C++ code writes to the standard output as it starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@atexit.register
def _leave() -> None:
    with _no_greeting():
        kt_layer.cache_clear()


@functools.lru_cache(maxsize=4)
def kt_layer(name: str, threads: int) -> KtLayer:
    """Kept from row to row: loading 64 experts takes seconds."""
    return KtLayer(name, threads, layer_weights())


def kt_weights(
    int4: bool, weights: tuple[Tensor, Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Of gate, up and down the matrix of each expert, and its scales if there are any."""
    gate_up, down = weights
    half = gate_up.shape[1] // 2
    parts = [[w[:half] for w in gate_up], [w[half:] for w in gate_up], list(down)]
    if not int4:
        return [[w.contiguous() for w in part] for part in parts], [[], [], []]
    packed: list[list[Tensor]] = []
    scales: list[list[Tensor]] = []
    for part in parts:
        made = [quantize(w, _KT_INT4) for w in part]
        codes = [(q.codes() + 8).to(torch.uint8) for q in made]
        # Two codes a byte, the first in the low half.
        packed.append([(c[:, 0::2] | (c[:, 1::2] << 4)).contiguous() for c in codes])
        scales.append([q.scales.bfloat16() for q in made])
    return packed, scales


def _trial(layer: KtLayer, calls: Calls) -> float:
    ids = calls.each()
    times = []
    for _ in range(_TRIED):
        start = time.perf_counter()
        layer.forward(calls.x, calls.weights, ids())
        times.append(time.perf_counter() - start)
    return quantile(times[1:], 0.2)


@functools.cache
def _flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def int4_errors(gate_up: Tensor, down: Tensor, x: Tensor, want: Tensor) -> dict[str, float]:
    """Of kt-kernel's int4 in groups of 32 on a layer of one expert, by the error of its output."""
    if machine.version(KT) is None:
        return {}
    ids, weights = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    with _no_greeting():
        layer = KtLayer("AVX2RawInt4_MOE", 1, (gate_up, down))
        got = layer.forward(x.bfloat16(), weights, ids)
        del layer  # it says good-bye
    return {KT: relative(got, want)}
