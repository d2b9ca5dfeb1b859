"""Sink attention, trained: the backward pass, whole steps, the balance loss, memory and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quernstone.attention import head_balance_loss, sink_attention, torch_op
from quernstone.bench import limits
from quernstone.bench.cases.attention import (
    AttentionCase,
    Inputs,
    arguments,
    gradient_error,
    sweep,
    trained,
)
from quernstone.bench.harness import Check, Measure, Pace, Rival, rows
from quernstone.bench.memory import peak_beyond
from quernstone.bench.rivals import attention as rivals

Gradients = dict[str, Tensor]
# Five products of queries and keys in a backward pass, two in a forward pass.
BACKWARD_OVER_FORWARD = 2.5
MEGA = 1e6
# So much that a check of the gradients sees the loss's part of them.
LOSS_WEIGHT = 1e4
# A step is long and its overhead is near the promise's bound: rounds for a few tenths of a percent.
MANY_ROUNDS = Pace(seconds=150.0, least=100, most=400)


def _forward(case: AttentionCase, x: Inputs) -> Tensor:
    out = sink_attention(x.q, x.k, x.v, **arguments(case, x))
    assert isinstance(out, Tensor)
    return out


def _step(case: AttentionCase, x: Inputs) -> Callable[[], Gradients]:
    """Forward and backward through autograd."""
    wanted, dout = trained(case, x), case.incoming()

    def run() -> Gradients:
        gradients = torch.autograd.grad(_forward(case, x), list(wanted.values()), dout)
        return dict(zip(wanted, gradients, strict=True))

    return run


def _backward(case: AttentionCase, x: Inputs) -> Callable[[], Gradients]:
    """The backward pass alone, of a forward pass that was made before."""
    sinks = x.sinks if case.kind == "sink" else None
    gate = x.gate if case.kind == "gated" else None
    call = (x.q, x.k, x.v, case.kind, sinks, gate, case.causal, case.window, None)
    out, lse, _, _ = torch_op.sink_attention_training(*call)
    dout = case.incoming()

    def run() -> Gradients:
        gradients = torch_op.sink_attention_backward(
            dout, None, None, out, lse, None, *call, None, None, None
        )
        names = ("q", "k", "v", "sinks", "gate")
        return {name: found for name, found in zip(names, gradients, strict=True) if found.numel()}

    return run


def _right(case: AttentionCase) -> Check:
    return rivals.gradient_check(case, slack=1.0)


@rows(
    *sweep("attention.backward", "fp32", quick=("attention.backward.fp32.causal.d64.s2048.t2",)),
    *sweep("attention.backward", "bf16"),
)
def bench_backward(case: AttentionCase, measure: Measure) -> None:
    x = case.inputs()
    measure.speed(
        what=f"backward {case.dtype}, causal, S {case.queries}, D {case.width}, "
        f"Hkv {case.kv_heads}",
        ours=_backward(case, x),
        check=_right(case),
        limit=limits.arithmetic(case.dtype),
        work=BACKWARD_OVER_FORWARD * case.flops,
        moved=2 * case.moved,
    )


@rows(
    *sweep("attention.step", "fp32", quick=("attention.step.fp32.causal.d64.s2048.t2",)),
    *sweep("attention.step", "bf16"),
)
def bench_step(case: AttentionCase, measure: Measure) -> None:
    x = case.inputs()
    measure.speed(
        what=f"forward + backward {case.dtype}, causal, S {case.queries}, D {case.width}, "
        f"Hkv {case.kv_heads}",
        ours=_step(case, x),
        check=_right(case),
        rivals=rivals.steps(case, x),
        limit=limits.arithmetic(case.dtype),
        work=(1 + BACKWARD_OVER_FORWARD) * case.flops,
        moved=3 * case.moved,
    )


def _balanced(dtype: str, width: int, threads: int, quick: bool = False) -> AttentionCase:
    row_id = f"attention.overhead.loss.{dtype}.d{width}.s2048.t{threads}"
    return AttentionCase(row_id, threads, quick, dtype, width=width)


@rows(
    *(
        _balanced("fp32", width, threads, quick=(width, threads) == (64, 2))
        for width in (64, 128)
        for threads in (1, 2)
    ),
    *(_balanced("bf16", 64, threads) for threads in (1, 2)),
)
def bench_loss(case: AttentionCase, measure: Measure) -> None:
    """A step whose loss holds the head-balance loss too, beside the same step without."""
    x = case.inputs()
    wanted, dout = trained(case, x), case.incoming()

    def ours() -> Gradients:
        out, aux = sink_attention(x.q, x.k, x.v, return_aux=True, **arguments(case, x))
        loss = head_balance_loss(aux.importance.unsqueeze(0), weight=LOSS_WEIGHT)
        gradients = torch.autograd.grad([out, loss], list(wanted.values()), [dout, None])
        return dict(zip(wanted, gradients, strict=True))

    measure.relative(
        what=f"balance loss {case.dtype}, D {case.width}: a step's time over that without it",
        ours=ours,
        base=Rival("no loss", _step(case, x), _right(case)),
        check=Check(
            lambda gradients: gradient_error(
                gradients, case.expected_gradients(balance=LOSS_WEIGHT)
            ),
            _right(case).tolerance,
        ),
        summary="upper95",
        pace=None if measure.quick else MANY_ROUNDS,
    )


def step_memory_call(threads: int, dtype: str, **shape: int) -> Callable[[], list[Tensor]]:
    """The first large step of a process, so that memory which is kept for the next counts too.

    A small step goes before it: what torch loads at the first backward pass, some 40 MB whatever
    the shapes, is not the step's.
    """
    torch.set_num_threads(threads)
    case = AttentionCase("large", threads, dtype=dtype, **shape)
    small = replace(case, queries=64, keys=64)
    _step(small, small.inputs())()
    x = case.inputs()
    wanted, dout = trained(case, x), case.incoming()

    def run() -> list[Tensor]:
        out = _forward(case, x)
        return [out, *torch.autograd.grad(out, list(wanted.values()), dout)]

    return run


def _large(dtype: str, threads: int, kv_heads: int = 8, quick: bool = False) -> AttentionCase:
    shared = "" if kv_heads == 8 else f".kv{kv_heads}"
    row_id = f"attention.memory.step.{dtype}.d64.s16384{shared}.t{threads}"
    return AttentionCase(
        row_id, threads, quick, dtype, kv_heads=kv_heads, queries=16384, keys=16384
    )


@rows(
    _large("fp32", 1),
    _large("fp32", 2),
    _large("bf16", 1),
    _large("bf16", 2),
    _large("bf16", 2, kv_heads=2),
)
def bench_step_memory(case: AttentionCase, measure: Measure) -> None:
    scores = case.heads * case.queries * case.keys * 4 / 1e9
    measure.value(
        what=f"peak memory of a step beyond inputs, output and gradients, {case.dtype}, "
        f"S {case.queries}, D {case.width}",
        unit="MB",
        kind="bytes",
        compute=lambda: (
            peak_beyond(
                "quernstone.bench.bench_attention_training:step_memory_call",
                threads=case.threads,
                dtype=case.dtype,
                queries=case.queries,
                keys=case.keys,
                kv_heads=case.kv_heads,
                width=case.width,
            )
            / MEGA
        ),
        notes=[f"eager attention keeps score matrices of {scores:.1f} GB each"],
    )


@dataclass(frozen=True)
class Extreme(AttentionCase):
    """A case whose sinks or gates are moved to where they leave few digits."""

    sink: float = 0.0
    gate_scale: float = 1.0

    def inputs(self) -> Inputs:
        x = super().inputs()
        return x._replace(sinks=x.sinks + self.sink, gate=self.gate_scale * x.gate)


@rows(
    *(
        Extreme(f"attention.error.gradient.{name}.d{width}.s2048", 2, quick, width=width, **changes)
        for name, quick, changes in (
            ("sink", True, {}),
            ("sink60", False, {"sink": 60.0}),
            ("sink-60", False, {"sink": -60.0}),
            ("gated", False, {"kind": "gated"}),
            ("saturated", False, {"kind": "gated", "gate_scale": 40.0}),
            ("vanilla", False, {"kind": "vanilla"}),
        )
        for width in (64, 128)
    )
)
def bench_gradient_error(case: Extreme, measure: Measure) -> None:
    def worst() -> float:
        return gradient_error(_step(case, case.inputs())(), case.expected_gradients())

    measure.value(
        what=f"{case.kind} gradients, the worst input: relative Frobenius error, D {case.width}",
        unit="relative",
        compute=worst,
    )
