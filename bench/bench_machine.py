"""The machine's own limits, beside which every other row is read."""

from __future__ import annotations

import time

from quernstone.bench import limits
from quernstone.bench.harness import Measure, Named, rows
from quernstone.bench.rows import Spread

GIGA = 1e9


@rows(
    Named("machine.mm.fp32.t1", 1, quick=True),
    Named("machine.mm.fp32.t2", 2, quick=True),
    Named("machine.mm.bf16.t1", 1),
    Named("machine.mm.bf16.t2", 2),
)
def bench_matmul(case: Named, measure: Measure) -> None:
    dtype = case.id.split(".")[2]
    limit = limits.matmul(dtype)
    seconds = limits.warm_seconds(limit.run)

    def rate() -> Spread:
        times = []
        for _ in range(max(3, min(21, int(1.0 / seconds)))):
            start = time.perf_counter()
            limit.run()
            times.append(time.perf_counter() - start)
        return Spread.of([limit.work / t / GIGA for t in times])

    measure.value(what=limit.name, unit="GF/s", compute=rate)


@rows(
    Named("machine.dram.read.t1", 1, quick=True),
    Named("machine.dram.read.t2", 2, quick=True),
    Named("machine.dram.copy.t1", 1),
    Named("machine.dram.copy.t2", 2),
)
def bench_memory(case: Named, measure: Measure) -> None:
    copies = case.id.split(".")[2] == "copy"
    sweep = limits.copy_bandwidth if copies else limits.read_bandwidth
    best = sweep(measure.quick)
    size = f"{best.size / limits.GIB:g} GiB"
    what = f"non-temporal copy of {size}, read + written" if copies else f"read of {size}"
    measure.value(
        what=what,
        unit="GB/s",
        compute=lambda: best.rate.scaled(1 / GIGA),
        notes=[best.words()],
    )
