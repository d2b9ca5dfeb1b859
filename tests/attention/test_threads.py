"""torch's pool and no other, the GIL released, and the same bits from any thread."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from quernstone import _core
from quernstone.attention import sink_attention

from .cases import KINDS, Case, run, split

# Threads of a fresh process before and after our first call, the pool being up already or not.
COUNT = """
import os, torch
from quernstone.attention import sink_attention
torch.set_num_threads({threads})
if {warm}:
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
x = torch.randn(1, 4, 300, 64)
before = len(os.listdir("/proc/self/task"))
sink_attention(x, x, x, sinks=torch.zeros(4))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_follows_the_number_of_threads_of_torch(threads: int) -> None:
    torch.set_num_threads(threads)
    assert _core.num_threads() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("threads", "warm", "started"), [(1, False, 0), (2, False, 1), (2, True, 0), (3, True, 0)]
)
def test_starts_no_thread_that_torch_would_not(threads: int, warm: bool, started: int) -> None:
    code = COUNT.format(threads=threads, warm=warm)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= started


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_several_threads_do_not_disturb_each_other(isa: str, kind: str) -> None:
    cases = [Case(kind=kind, ratio=2, queries=97 + i, keys=150 + i, width=64) for i in range(4)]
    alone = [run(case) for case in cases]
    differing: list[str] = []

    def work(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        for _ in range(5):
            out, aux = run(cases[i])
            want, want_aux = alone[i]
            assert aux is not None
            assert want_aux is not None
            pairs = [(out, want), *zip(aux, want_aux, strict=True)]
            if not all(torch.equal(got, wanted) for got, wanted in pairs):
                differing.append(str(cases[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not differing


def test_other_python_threads_run_during_a_call() -> None:
    (q, k, v), options = Case(batch=1, ratio=4, queries=1500, keys=1500, width=64).make()
    count = 0
    counting, done = threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal count
        while not done.is_set():
            count += 1
            counting.set()
            time.sleep(0)

    ticker = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # The interpreter itself takes the GIL from nobody now: only a call that gives it up lets the
    # ticker run. torch's dispatcher does so for a moment too, hence more than a few ticks.
    sys.setswitchinterval(100.0)
    try:
        ticker.start()
        counting.wait()
        before = count
        sink_attention(q, k, v, **options)
        during = count - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        ticker.join()
    assert during > 10


def test_autocast_of_the_caller_changes_nothing() -> None:
    (q, k, v), options = Case(aux=False).make()
    want, _ = split(sink_attention(q, k, v, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sink_attention(q, k, v, **options), want)
