"""Benchmarks of nothing much: what the harness does is seen in the order and the counts."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quernstone.bench.harness import Check, Measure, Named, Rival

ALWAYS_RIGHT = Check(lambda _result: 0.0, 0.0)


@dataclass
class Stage:
    """A clock that only the workloads move, and the order in which they ran."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if seconds:
            self.log.append("rest")

    def work(self, name: str, seconds: float, result: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            self.log.append(name)
            self.now += seconds
            return result

        return run

    def rival(self, name: str, seconds: float, check: Check = ALWAYS_RIGHT) -> Rival:
        return Rival(name, self.work(name, seconds), check)


class FakeBenchmark:
    """pytest-benchmark's fixture, reduced to pedantic mode and the stage's clock."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        self.timing: list[int] = []

    def pedantic(
        self,
        target: Callable[[], Any],
        setup: Callable[[], None] = lambda: None,
        rounds: int = 1,
        iterations: int = 1,
    ) -> Any:
        assert iterations == 1
        result = None
        self.timing.append(rounds)
        self.stage.log.append("|")
        for _ in range(rounds):
            setup()
            start = self.stage.now
            result = target()
            self.stats.stats.data.append(self.stage.now - start)
        return result


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage()
    with monkeypatch.context() as patch:
        time = SimpleNamespace(perf_counter=stage.clock, sleep=stage.sleep)
        patch.setattr("quernstone.bench.harness.time", time)
        yield stage


def measure(stage: Stage, quick: bool = False) -> tuple[Measure, FakeBenchmark]:
    benchmark = FakeBenchmark(stage)
    return Measure(benchmark, Named("fake.row.t1"), quick), benchmark


SUM = '''
    """A vertical of one file."""
    from quernstone.bench.harness import Absent, Check, Named, Rival, rows

    RIGHT = Check(lambda result: abs(result - 499500), 0)

    @rows(Named("fake.sum.t1", 1, quick=True), Named("fake.sum.t2", 2))
    def bench_sum(case, measure):
        measure.speed(
            what="sum of a thousand numbers",
            ours=lambda: sum(range(1000)),
            check=RIGHT,
            rivals=[
                Rival("listed", lambda: sum(list(range(1000))), RIGHT),
                Absent("abacus", "not installed: pip install abacus"),
            ],
            unit="us",
        )

    @rows(Named("fake.bytes", 1, quick=True))
    def bench_bytes(case, measure):
        measure.value(what="size", unit="MB", kind="bytes", compute=lambda: 3.0)
'''


def bench_file(folder: Path, text: str = SUM, vertical: str = "fake") -> Path:
    """Writes a benchmark file; an earlier test's of the same name is forgotten."""
    sys.modules.pop(f"bench_{vertical}", None)
    path = folder / f"bench_{vertical}.py"
    path.write_text(textwrap.dedent(text))
    return path


def targets_file(folder: Path, *lines: tuple[str, str, str, float]) -> Path:
    """(row id, measure, comparison, value) of each target; measure may be `ratio:rival`."""
    path = folder / "targets.toml"
    tables = []
    for row_id, measured, comparison, value in lines:
        name, _, rival = measured.partition(":")
        table = f'[[target]]\nid = "{row_id}"\nmeasure = "{name}"\nwords = "as promised"\n'
        table += f'comparison = "{comparison}"\nvalue = {value}\n'
        tables.append(table + (f'rival = "{rival}"\n' if rival else ""))
    path.write_text("\n".join(tables))
    return path
