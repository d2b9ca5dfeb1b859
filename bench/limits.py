"""What this machine can do at best: matrix product and memory, measured where a row needs it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from quernstone import _core
from quernstone.bench import machine
from quernstone.bench.harness import Limit, warm_seconds
from quernstone.bench.rows import Spread

SIDE = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 1 << 30
HUGE_PAGE = 2 << 20
PAGES = ("4k", "2M")
PREFETCH = (0, 256, 512, 1024, 2048)
# A copy is also tried with what reaches the next page.
COPY_PREFETCH = (*PREFETCH, 4096, 8192)
STREAMS = (1, 4)


def matmul(dtype: str) -> Limit:
    """`torch.mm` of two 1024 x 1024 matrices at the current number of threads."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    return Limit(f"torch.mm {dtype} {SIDE}³", lambda: torch.mm(left, right, out=out), 2 * SIDE**3)


def arithmetic(dtype: str) -> Limit:
    """The faster of `torch.mm` in the dtype and in fp32.

    A CPU without bf16 instructions multiplies bf16 matrices slower than it multiplies fp32 ones,
    by a factor of fifty in places; that would be no limit.
    """
    own = matmul(dtype)
    if dtype == "fp32":
        return own
    wide = matmul("fp32")
    seconds = [min(warm_seconds(limit.run) for _ in range(2)) for limit in (own, wide)]
    return own if seconds[0] <= seconds[1] else wide


@contextlib.contextmanager
def buffer(size: int, page: str) -> Iterator[int]:
    """The address of `size` private bytes on pages of about 4 kB or 2 MB, all touched."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = "MADV_HUGEPAGE" if page == "2M" else "MADV_NOHUGEPAGE"
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(getattr(mmap, advice))
    view = ctypes.c_char.from_buffer(memory)
    address = -(-ctypes.addressof(view) // HUGE_PAGE) * HUGE_PAGE
    ctypes.memset(address, 1, size)
    try:
        yield address
    finally:
        del view
        memory.close()


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of the best setting; a copy counts what it reads and what it writes."""

    rate: Spread
    page: str
    prefetch: int
    size: int
    streams: int = 1

    def words(self) -> str:
        distance = f"{self.prefetch} B ahead" if self.prefetch else "no software prefetch"
        streams = f", {self.streams} streams a thread" if self.streams > 1 else ""
        return f"best over page sizes and distances: {self.page} pages, {distance}{streams}"


def read_bandwidth(quick: bool) -> Bandwidth:
    found = [
        replace(
            _sweep(
                quick,
                buffers=1,
                run=lambda at, size, far, n=streams: _core.bench_read(at[0], size, far, n),
            ),
            streams=streams,
        )
        for streams in STREAMS
    ]
    return max(found, key=lambda bandwidth: bandwidth.rate.median)


@contextlib.contextmanager
def reading() -> Iterator[Limit]:
    """Reading DRAM at the best of the settings for pages and prefetching, for a row's rounds."""
    best = read_bandwidth(quick=True)
    with buffer(best.size, best.page) as address:
        yield Limit(
            "DRAM read",
            lambda: _core.bench_read(address, best.size, best.prefetch, best.streams),
            best.size,
            "GB/s",
        )


@contextlib.contextmanager
def copying() -> Iterator[Limit]:
    """A non-temporal copy, read and written bytes together, at the best of the settings."""
    best = copy_bandwidth(quick=True)
    with buffer(best.size, best.page) as to, buffer(best.size, best.page) as source:
        yield Limit(
            "DRAM copy",
            lambda: _core.bench_copy_nt(to, source, best.size, best.prefetch),
            2 * best.size,
            "GB/s",
        )


def copy_bandwidth(quick: bool) -> Bandwidth:
    return _sweep(
        quick, buffers=2, run=lambda at, size, far: _core.bench_copy_nt(at[0], at[1], size, far)
    )


def _sweep(quick: bool, buffers: int, run: Callable[[list[int], int, int], float]) -> Bandwidth:
    size = _affordable(buffers)
    rounds = 2 if quick else 9
    best: Bandwidth | None = None
    for page in PAGES:
        with contextlib.ExitStack() as stack:
            at = [stack.enter_context(buffer(size, page)) for _ in range(buffers)]
            distances = PREFETCH if buffers == 1 else COPY_PREFETCH
            for far in distances[::2] if quick else distances:
                rates = [buffers * size / run(at, size, far) for _ in range(rounds)]
                rate = Spread.of(rates)
                if best is None or rate.median > best.rate.median:
                    best = Bandwidth(rate, page, far, size)
    assert best is not None
    return best


def _affordable(buffers: int) -> int:
    """1 GiB, or less where that many buffers would take more than half of what is free."""
    size = GIB
    while buffers * size > machine.available_bytes() // 2 and size > GIB // 16:
        size //= 2
    return size
