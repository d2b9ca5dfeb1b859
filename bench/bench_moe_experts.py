"""Fused experts on the CPU, beside the memory's limit and other libraries' experts."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quernstone.bench import limits
from quernstone.bench.cases.experts import (
    FORMATS,
    OF,
    Calls,
    ExpertCase,
    expected,
    layer_weights,
    relative,
)
from quernstone.bench.harness import Check, Measure, Slope, rows
from quernstone.bench.rivals import experts as rivals
from quernstone.bench.rivals import ik_llama
from quernstone.bench.rows import Spread
from quernstone.moe import Experts, ExpertsShape, profile_machine, reference
from quernstone.moe.experts import Format

# Relative to fp64 with the same weights: fp32 sums, or activations of 8 bits, twice.
KINDS: dict[str, ik_llama.Kind] = {"int4": "Q4_0", "int8": "Q8_0"}
TOLERANCE = {"bf16": 2e-5, "int8": 0.02, "int4": 0.02}


@functools.lru_cache(maxsize=1)
def packed(format: Format) -> Experts:
    return Experts.pack(*layer_weights(), format=format)


@rows(
    *(
        ExpertCase(format, batch, threads, quick=(batch, threads) == (1, 2))
        for format in FORMATS
        for batch in (1, 4, 16, 64)
        for threads in (1, 2)
    )
)
def bench_experts(case: ExpertCase, measure: Measure) -> None:
    """Each library at the same number of threads; activations of 8 bits on both sides for int4 and
    int8, and the same bf16 tokens."""
    experts, calls = packed(case.format), Calls(case)
    ids = calls.each()

    def ours() -> Tensor:
        return experts(calls.x, ids(), calls.weights)

    want = expected(experts.matrices, calls)
    # The tokens come back as bf16.
    check = Check(lambda got: relative(got, want), TOLERANCE[case.format] + 2**-8)
    moved = calls.bytes(case.shape)
    with limits.reading() as limit:
        measure.speed(
            what=f"{case.format} experts, H 2048, I 1408, batch {case.batch} of 6 experts each",
            ours=ours,
            check=check,
            rivals=rivals.all_of(case, calls),
            limit=limit,
            work=moved,
            notes=[
                f"{moved / 1e6:.0f} MB of weights a call, of "
                f"{experts.shape.nbytes / 1e6:.0f} MB in rotation, in pages of 2 MB",
            ],
        )


@dataclass(frozen=True)
class OneExpertCase:
    format: Format
    threads: int
    quick: bool = False

    @property
    def id(self) -> str:
        name = f"{self.format}g32" if self.format == "int4" else self.format
        return f"moe.expert.{name}.dsv2lite.t{self.threads}"


FEW, MANY = 2, 8


@rows(*(OneExpertCase(format, threads) for format in ("int4", "int8") for threads in (1, 2)))
def bench_one_expert(case: OneExpertCase, measure: Measure) -> None:
    """What an expert costs: a token of eight experts less a token of two, on both sides."""
    experts = packed(case.format)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, OF.hidden, generator=generator).bfloat16()
    ids = [torch.randperm(OF.experts, generator=generator)[None, :MANY] for _ in range(256)]
    # Both calls of a round choose alike, so that neither finds more in the caches.
    turns = {count: itertools.cycle(ids) for count in (FEW, MANY)}

    def run(count: int) -> Tensor:
        return experts(x, next(turns[count])[:, :count].contiguous(), weights[count])

    weights = {count: torch.full((1, count), 1 / count) for count in (FEW, MANY)}
    want = reference.experts(
        [experts.matrices(int(e)) for e in ids[0][0]], x, torch.arange(MANY)[None], weights[MANY]
    )
    measure.slope(
        what=f"one {case.format} expert, one token, H 2048, I 1408: {MANY} less {FEW} experts",
        ours=Slope(lambda: run(FEW), lambda: run(MANY), MANY - FEW),
        check=Check(lambda got: relative(got, want), TOLERANCE[case.format] + 2**-8),
        rivals=[ik_llama.per_expert(KINDS[case.format], case.threads, FEW, MANY)],
        notes=[f"{packed(case.format).shape.expert_bytes / 1e6:.1f} MB an expert"],
    )


@dataclass(frozen=True)
class ErrorCase:
    name: str
    group: int
    zero_points: bool = False
    threads: int = 2
    quick: bool = True

    @property
    def id(self) -> str:
        return f"moe.error.{self.name}"


@rows(
    ErrorCase("int4g32", 32),
    ErrorCase("int4g32z", 32, True),
    ErrorCase("int4g64", 64),
    ErrorCase("int4g128", 128),
)
def bench_error(case: ErrorCase, measure: Measure) -> None:
    """Of a Gaussian expert's output, against fp64 with the weights before they were rounded."""
    gate_up, down = (stack[:1] for stack in layer_weights())
    experts = Experts.pack(gate_up, down, group=case.group, zero_points=case.zero_points)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, OF.hidden, generator=generator)
    ids, weights = torch.zeros(16, 1, dtype=torch.int64), torch.ones(16, 1)
    gate, up = gate_up[0].float().chunk(2)
    want = reference.experts([(gate, up, down[0].float())], x, ids, weights)
    measure.value(
        what=f"int4 expert, groups of {case.group}{', zero points' * case.zero_points}: error "
        "of a Gaussian expert's output",
        unit="relative",
        compute=lambda: relative(experts(x, ids, weights), want),
        rivals=rivals.int4_errors(gate_up, down, x, want),
    )


@dataclass(frozen=True)
class CostCase:
    format: Format
    threads: int
    quick: bool = False

    @property
    def id(self) -> str:
        return f"moe.cost.{self.format}.dsv2lite.t{self.threads}"


LAYERS = 40


@rows(*(CostCase(format, threads) for format in ("int4", "bf16") for threads in (1, 2)))
def bench_cost(case: CostCase, measure: Measure) -> None:
    """Layers of random loads, predicted from curves that were measured before, and then timed."""
    group = 32 if case.format == "int4" else 0
    shape = ExpertsShape(OF.experts, OF.hidden, OF.intermediate, case.format, group)
    experts = packed(case.format)
    generator = np.random.default_rng(0)

    def compute() -> Spread:
        model = profile_machine(replace(shape, count=1), gpu="a6000-xeon10", rounds=9)
        errors = []
        for _ in range(LAYERS):
            count = int(generator.integers(1, 13))
            loads = np.minimum(1 + generator.pareto(0.8, count), 256).astype(np.int64)
            chosen = generator.permutation(OF.experts)[:count]
            ids = torch.from_numpy(np.repeat(chosen, loads))[:, None]
            x = torch.randn(len(ids), OF.hidden)
            weights = torch.ones(len(ids), 1)
            times = []
            for turn in range(3):
                rotated = (ids + turn * 13) % OF.experts
                start = time.perf_counter()
                experts(x, rotated, weights)
                times.append(time.perf_counter() - start)
            errors.append(abs(model.layer_seconds(loads) / float(np.median(times)) - 1))
        return Spread.of(errors).scaled(100)

    measure.value(
        what=f"{case.format} experts: predicted time of a layer against its time, 1 to 12 experts "
        "of 1 to 256 tokens",
        unit="%",
        compute=compute,
        notes=[f"median over {LAYERS} layers of the relative difference"],
    )
