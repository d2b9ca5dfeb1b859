"""Sink attention, forward: speed beside its rivals, overhead, memory and error."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quernstone import _core
from quernstone.attention import sink_attention
from quernstone.attention.types import Aux
from quernstone.bench import limits
from quernstone.bench.cases.attention import (
    AttentionCase,
    Inputs,
    arguments,
    relative_error,
    sweep,
)
from quernstone.bench.harness import Check, Measure, Rival, rows
from quernstone.bench.memory import peak_beyond
from quernstone.bench.rivals import attention as rivals
from quernstone.bench.rows import Spread

FORWARD = "attention.forward"
MEGA = 1e6


def _ours(case: AttentionCase, x: Inputs) -> Callable[[], Tensor]:
    keywords = arguments(case, x)

    def run() -> Tensor:
        out = sink_attention(x.q, x.k, x.v, **keywords)
        assert isinstance(out, Tensor)
        return out

    return run


def _right(case: AttentionCase, *, plain: bool = False) -> Check:
    return rivals.check(case, plain=plain, slack=1.0)


@rows(
    *sweep(
        FORWARD,
        "fp32",
        quick=(
            f"{FORWARD}.fp32.causal.d64.s2048.t1",
            f"{FORWARD}.fp32.causal.d64.s2048.t2",
            f"{FORWARD}.fp32.causal.d128.s2048.t2",
            f"{FORWARD}.fp32.causal.d64.s2048.kv2.t2",
        ),
    ),
    *sweep(FORWARD, "bf16", quick=(f"{FORWARD}.bf16.causal.d64.s2048.t2",)),
)
def bench_forward(case: AttentionCase, measure: Measure) -> None:
    x = case.inputs()
    measure.speed(
        what=f"forward {case.dtype}, causal, S {case.queries}, D {case.width}, Hkv {case.kv_heads}",
        ours=_ours(case, x),
        check=_right(case),
        rivals=rivals.all_of(case, x),
        limit=limits.arithmetic(case.dtype),
        work=case.flops,
        moved=case.moved,
    )


def _windowed(width: int, threads: int, quick: bool = False) -> AttentionCase:
    row_id = f"{FORWARD}.fp32.window128.d{width}.s8192.t{threads}"
    return AttentionCase(row_id, threads, quick, width=width, queries=8192, keys=8192, window=128)


@rows(
    _windowed(64, 1),
    _windowed(64, 2, quick=True),
    _windowed(128, 1),
    _windowed(128, 2),
)
def bench_window(case: AttentionCase, measure: Measure) -> None:
    dense = replace(case, id="dense", queries=2048, keys=2048, window=None)
    base = Rival("dense row", _ours(dense, dense.inputs()), _right(dense))
    measure.relative(
        what=f"window {case.window}, S {case.queries}, D {case.width}: "
        "time over that of its useful work at the dense row's rate",
        ours=_ours(case, case.inputs()),
        base=base,
        check=_right(case),
        scale=dense.flops / case.flops,
    )


def _overhead(
    name: str, width: int, threads: int, dtype: str = "fp32", quick: bool = False
) -> AttentionCase:
    row_id = f"attention.overhead.{name}.{dtype}.d{width}.s2048.t{threads}"
    kind = "gated" if name == "gate" else "sink"
    return AttentionCase(row_id, threads, quick, dtype, kind, width=width)


@rows(
    *(
        _overhead(name, width, threads, quick=(width, threads) == (64, 2))
        for name in ("importance", "gate")
        for width in (64, 128)
        for threads in (1, 2)
    ),
    *(_overhead("importance", 64, threads, "bf16") for threads in (1, 2)),
)
def bench_overhead(case: AttentionCase, measure: Measure) -> None:
    """The gate and its mean per head, beside plain attention by the same kernel."""
    x = case.inputs()
    plain = replace(case, kind="vanilla")

    def ours() -> tuple[Tensor, Aux]:
        result = sink_attention(x.q, x.k, x.v, return_aux=True, **arguments(case, x))
        assert isinstance(result, tuple)
        return result

    def error(result: tuple[Tensor, Aux]) -> float:
        out, aux = result
        mean_gate = _gates(case, x, aux).mean(dim=(0, 2, 3))
        disagreement = float((aux.importance.double() - mean_gate).abs().max())
        return max(disagreement, relative_error(out, case.expected()))

    gate = "element-wise gate" if case.kind == "gated" else "sink"
    measure.relative(
        what=f"{gate} + importance {case.dtype}, D {case.width}: time over the same kernel without",
        ours=ours,
        base=Rival("plain", _ours(plain, x), _right(plain)),
        check=Check(error, _right(case).tolerance),
        summary="upper95",
    )


def _gates(case: AttentionCase, x: Inputs, aux: Aux) -> Tensor:
    if case.kind == "gated":
        return x.gate.double().sigmoid()
    return (aux.lse.double() - x.sinks.double().view(-1, 1)).sigmoid().unsqueeze(-1)


def memory_call(name: str, threads: int, **shape: Any) -> Callable[[], Tensor]:
    """The first call of a process, so that scratch memory which is kept for the next counts too."""
    torch.set_num_threads(threads)
    case = AttentionCase("large", threads, **shape)
    x = case.inputs()
    return _ours(case, x) if name == "ours" else rivals.flash(case, x).run


@rows(
    AttentionCase("attention.memory.fp32.d64.s16384.t1", 1, queries=16384, keys=16384),
    AttentionCase("attention.memory.fp32.d64.s16384.t2", 2, True, queries=16384, keys=16384),
)
def bench_memory(case: AttentionCase, measure: Measure) -> None:
    def peak(name: str) -> float:
        return (
            peak_beyond(
                "quernstone.bench.bench_attention:memory_call",
                name=name,
                threads=case.threads,
                queries=case.queries,
                keys=case.keys,
                width=case.width,
            )
            / MEGA
        )

    scores = case.heads * case.queries * case.keys * 4 / 1e9
    measure.value(
        what=f"peak memory beyond inputs and output, S {case.queries}, D {case.width}",
        unit="MB",
        kind="bytes",
        compute=lambda: peak("ours"),
        rivals={} if measure.quick else {rivals.FLASH: peak("flash")},
        notes=[f"eager attention's score matrix alone would take {scores:.1f} GB"],
    )


@rows(
    *(
        AttentionCase(f"attention.error.fp32.normal.d{width}.s2048", quick=True, width=width)
        for width in (64, 128)
    )
)
def bench_error(case: AttentionCase, measure: Measure) -> None:
    measure.value(
        what=f"{case.dtype} relative Frobenius error, N(0, 1) inputs, D {case.width}",
        unit="relative",
        compute=lambda: relative_error(_ours(case, case.inputs())(), case.expected()),
    )


def _deviating(dtype: str, width: int, deviation: int) -> AttentionCase:
    row_id = f"attention.error.{dtype}.sd{deviation}.d{width}.s2048"
    quick = (dtype, width, deviation) in {("fp32", 64, 10), ("bf16", 64, 1)}
    return AttentionCase(
        row_id, 1, quick, dtype, "vanilla", width=width, deviation=float(deviation)
    )


@rows(
    *(_deviating("fp32", width, sd) for width in (64, 128) for sd in (1, 5, 10, 20)),
    *(_deviating("bf16", width, 1) for width in (64, 128)),
)
def bench_error_beside_flash(case: AttentionCase, measure: Measure) -> None:
    errors: list[tuple[float, float]] = []

    def worst() -> float:
        for seed in range(1 if measure.quick else 3):
            seeded = replace(case, seed=seed)
            x, expected = seeded.inputs(), seeded.expected()
            mine = relative_error(_ours(seeded, x)(), expected)
            theirs = relative_error(rivals.flash(seeded, x).run(), expected)
            errors.append((mine, theirs))
        return max(mine / theirs for mine, theirs in errors)

    row = measure.value(
        what=f"{case.dtype} error over torch flash's, logit sd {case.deviation:g}, D {case.width}",
        unit="x",
        compute=worst,
    )
    row.error = max(mine for mine, _ in errors)
    row.notes.append(f"torch flash: {max(theirs for _, theirs in errors):.2e}")


@rows(
    AttentionCase("attention.call.fp32.q1.k16.d64.t1", 1, True, queries=1, keys=16, kv_heads=2),
    AttentionCase("attention.call.fp32.q4.k4.d16.t1", 1, queries=4, keys=4, width=16),
)
def bench_call(case: AttentionCase, measure: Measure) -> None:
    """What a call costs beyond the compiled core: Python's checks, the operator, the binding."""
    run = _ours(case, case.inputs())
    error = _right(case).error(run())
    calls = 500 if measure.quick else 2000

    def beyond() -> Spread:
        sample = []
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            call = (time.perf_counter() - start) / calls
            inside = 0.0
            for _ in range(calls):
                run()
                inside += _core.attention.last_forward_seconds()
            sample.append((call - inside / calls) * MEGA)
        return Spread.of(sample)

    row = measure.value(
        what=f"a call beyond the compiled core, {case.queries} queries, {case.keys} keys, "
        f"D {case.width}",
        unit="us",
        compute=beyond,
    )
    row.error = error
