"""Times of calls on a device, rival and ours in alternating rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
# A launch takes microseconds: a sample is as many calls as fill this time.
SAMPLE_SECONDS = 4e-3
MOST_CALLS = 200


class Clock:
    """Seconds of a call on `device`: by CUDA events, or the wall clock on the CPU."""

    def __init__(self, device: torch.device, rounds: int = 15):
        self.device = device
        self.rounds = rounds

    def alternate(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """`rounds` samples of each, one round after the other, each beginning with another."""
        calls = {name: self._calls(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(self.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self._sample(runs[name], calls[name]))
        return times

    def _calls(self, run: Run) -> int:
        for _ in range(2):
            run()
        seconds = max(self._sample(run, 2), 1e-7)
        return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / seconds)))

    def _sample(self, run: Run, calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / calls
