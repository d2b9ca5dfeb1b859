"""Bit-serial macros beside matrix products and numpy, Hamming rates beside the memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quernstone import _core, pim
from quernstone.bench import limits
from quernstone.bench.cases import pim as cases
from quernstone.bench.cases.pim import MACRO, CountCase
from quernstone.bench.harness import Absent, Check, Limit, Measure, Rival, rows, warm_seconds
from quernstone.pim import reference

CALLS = 20
LINES = 256  # of 64 bytes: 16 kB, which the L1 cache holds
REPEATS = 4096
BITS_OF_LINE = 2048  # cells times cycles that a load of 64 bytes of a table tells


def differing(want: NDArray[np.integer]) -> Check:
    """How many of the integers are not those wanted."""
    return Check(lambda got: float(np.count_nonzero(np.asarray(got) != want)), 0)


def l1_limit() -> Limit:
    """Loads of 64 bytes from the L1 cache, each worth the bits that a look-up in a table is."""
    room = np.zeros(LINES * 64 + 64, np.uint8)
    start = -room.ctypes.data % 64
    address = room.ctypes.data + start
    size = LINES * 64
    return Limit(
        "64-byte L1 loads, 2048 bit-ops each",
        lambda: _core.pim.bench_loads(address, size, REPEATS),
        float(LINES * REPEATS * BITS_OF_LINE * _core.num_threads()),
        "Gbit-op/s",
    )


def present(formulation: str, measure: Measure, what: str) -> None:
    if formulation != "auto" and formulation not in pim.formulations():
        measure.absent(
            what=what, unit="us", missing=Absent(formulation, "this processor or level lacks it")
        )


def tell_rate(measure: Measure, words: str = "Tbit-op/s") -> None:
    if measure.row.ours:
        rate = cases.operations() / measure.row.ours / 1e6
        measure.row.notes.append(f"{rate:.3g} {words}")
        measure.row.work["rate"] = rate


@rows(
    *(CountCase("rtog", t, quick=True) for t in (1, 2)),
    *(CountCase("rtog", t, f) for f in ("table", "dot", "tiles") for t in (1, 2)),
)
def bench_rtog(case: CountCase, measure: Measure) -> None:
    """Toggles of every bank in every cycle from the integers of the inputs; the rivals multiply
    toggles that are ready for them, or make them first."""
    what = f"Rtog per bank and cycle, {case.formulation}: 512 x 64 macro, 8 x 8 bits, 256 vectors"
    present(case.formulation, measure, what)
    array, x = pim.Array(cases.weights(), MACRO), cases.inputs()
    want = reference.toggles(cases.weights(), x, MACRO)
    out = array.toggles(x).counts  # memory of its own, like torch's
    toggles, ones = torch.from_numpy(cases.line_bits()), torch.from_numpy(cases.ones())
    x_torch = torch.from_numpy(x.view(np.uint8))
    places = torch.arange(8, dtype=torch.uint8)

    def extracted() -> torch.Tensor:
        bits = (x_torch[:, None] >> places[:, None]) & 1
        levels = bits.reshape(-1, MACRO.rows)
        changes = levels.clone()
        changes[1:] ^= levels[:-1]
        return torch._int_mm(changes.view(torch.int8), ones)

    measure.speed(
        what=what,
        ours=lambda: array.toggles(x, formulation=case.formulation, out=out).counts,
        check=differing(want),
        rivals=[
            Rival(
                "torch._int_mm, toggles given",
                lambda: torch._int_mm(toggles, ones),
                differing(want[0]),
            ),
            Rival("torch, toggles from inputs", extracted, differing(want[0])),
        ],
        limit=l1_limit(),
        work=cases.operations(),
        unit="us",
        calls=CALLS,
    )
    tell_rate(measure)


@rows(*(CountCase("rtog-macro", t, quick=t == 1) for t in (1, 2)))
def bench_macro(case: CountCase, measure: Measure) -> None:
    """Toggles of the whole macro: sums of the row's ones, so no bit of a cell is looked at."""
    array, x = pim.Array(cases.weights(), MACRO), cases.inputs()
    want = reference.macro_toggles(cases.weights(), x, MACRO)
    out = np.empty(want.shape, np.int32)
    toggles = torch.from_numpy(cases.line_bits()).float()
    sums = torch.from_numpy(cases.ones().sum(axis=1, dtype=np.float32))
    measure.speed(
        what="Rtog per macro and cycle: 512 x 64 macro, 8 x 8 bits, 256 vectors",
        ours=lambda: array.toggles(x, "macro", out=out).counts,
        check=differing(want),
        rivals=[
            Rival(
                "torch.mv fp32, toggles given",
                lambda: torch.mv(toggles, sums),
                differing(want[0, :, 0]),
            )
        ],
        unit="us",
        calls=CALLS,
    )
    tell_rate(measure, "T bit-operations a second equivalent: algorithmic, most are never done")


@rows(*(CountCase("mvm", t, quick=t == 1) for t in (1, 2)))
def bench_mvm(case: CountCase, measure: Measure) -> None:
    """The product, one input bit a cycle, beside bit planes in numpy."""
    array, x = pim.Array(cases.weights(), MACRO), cases.inputs()
    w = cases.weights()
    want = x.astype(np.int64) @ w.astype(np.int64).T
    x_torch, w_torch = torch.from_numpy(x), torch.from_numpy(w).T
    measure.speed(
        what="bit-serial product: 512 x 64 macro, 8 x 8 bits, 256 vectors",
        ours=lambda: array.mvm(x),
        check=differing(want),
        rivals=[
            Rival("numpy bitwise_count", lambda: reference.mvm(w, x, MACRO), differing(want)),
            Absent(
                "CrossSim 3.2.0",
                "recorded: 0.009 Tbit-op/s, 232 us a vector on one core of a Zen 4, relative error "
                "0.9 %; not a pip package",
            ),
        ],
        unit="us",
        calls=CALLS,
        notes=["numpy: the same bits one after the other, our reference"],
    )
    tell_rate(measure)
    # Who wants the integers alone should know, but it is no rival: it has no cycles.
    plain = statistics.median(
        warm_seconds(lambda: torch._int_mm(x_torch, w_torch)) for _ in range(CALLS)
    )
    measure.row.notes.append(
        f"the plain product, torch._int_mm, gives the same integers in {1e6 * plain:.3g} us"
    )


@dataclass(frozen=True)
class HammingCase:
    threads: int
    quick: bool = False

    @property
    def id(self) -> str:
        return f"pim.hr.w8.1gib.t{self.threads}"


@contextmanager
def weights_beside_limit() -> Iterator[tuple[NDArray[np.int8], Limit]]:
    """As many weights as the limit reads, on pages of the same size: the limit's own memory."""
    import ctypes

    best = limits.read_bandwidth(quick=True)
    with limits.buffer(best.size, best.page) as address:
        memory = (ctypes.c_int8 * best.size).from_address(address)
        weights = np.frombuffer(memory, np.int8)
        rng = np.random.default_rng(0)
        weights[:] = np.resize(rng.integers(-128, 128, 1 << 20, np.int8), best.size)
        yield (
            weights,
            Limit(
                f"DRAM read, {best.page} pages",
                lambda: _core.bench_read(address, best.size, best.prefetch, best.streams),
                best.size,
                "GB/s",
            ),
        )


@rows(HammingCase(1, quick=True), HammingCase(2))
def bench_hr(case: HammingCase, measure: Measure) -> None:
    """The rate of ones of a model's weights, beside reading them."""
    with weights_beside_limit() as (weights, limit):
        part = weights[: 1 << 20]
        ones = int(reference.hamming_weights(part, 8).sum(dtype=np.int64)) * (
            len(weights) // len(part)
        )
        want = ones / (8 * len(weights))
        measure.speed(
            what=f"HR of {len(weights) >> 20} M weights of 8 bits",
            ours=lambda: pim.hamming_rate(weights, 8),
            check=Check(lambda got: abs(got - want), 0),
            limit=limit,
            work=len(weights),
            moved=len(weights),
        )
