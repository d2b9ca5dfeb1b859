"""The pytest plugin behind `quernstone bench`: chooses the rows and collects what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from quernstone.bench import machine
from quernstone.bench import targets as contract
from quernstone.bench.harness import Measure
from quernstone.bench.rows import Row


@dataclass
class Selection:
    """Which rows run; `only` narrows by exact id or by a dotted beginning of one."""

    quick: bool = False
    targets_only: bool = False
    only: tuple[str, ...] = ()

    def keeps(self, row_id: str, quick: bool, wanted: set[str]) -> bool:
        if self.targets_only and row_id not in wanted:
            return False
        if self.only and not any(f"{row_id}.".startswith(f"{name}.") for name in self.only):
            return False
        return quick or not self.quick


@dataclass
class Events:
    """What a caller may want to hear while rows run."""

    total: Callable[[int], None] = lambda _count: None
    started: Callable[[str], None] = lambda _row_id: None
    finished: Callable[[Row], None] = lambda _row: None


@dataclass
class Collector:
    """Holds the rows, figures and troubles of one run."""

    selection: Selection
    targets: list[contract.Target]
    versions: dict[str, str] = field(default_factory=dict)
    events: Events = field(default_factory=Events)
    rows: list[Row] = field(default_factory=list)
    panels: list[tuple[str, str, str, str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    @pytest.fixture
    def measure(self, benchmark: Any, case: Any) -> Iterator[Measure]:
        import torch

        cores = machine.cores()
        measure = Measure(benchmark, case, quick=self.selection.quick)
        if case.threads > cores:
            measure.row.notes.append(f"needs {case.threads} cores, this machine has {cores}")
            pytest.skip(measure.row.notes[-1])
        before = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        yield measure
        torch.set_num_threads(before)
        self.panels.extend((measure.row.vertical, *panel) for panel in measure.panels)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        cases = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
        ids = [case.id for case in cases]
        repeated = sorted({row_id for row_id in ids if ids.count(row_id) > 1})
        if repeated:
            raise pytest.UsageError(f"two benchmarks share the row id {', '.join(repeated)}")
        missing = contract.unknown(self.targets, ids)
        if missing:
            raise pytest.UsageError(
                f"targets.toml names rows that no benchmark produces: {', '.join(missing)}"
            )
        wanted = {target.id for target in self.targets}
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item, case in zip(items, cases, strict=True):
            chosen = self.selection.keeps(case.id, case.quick, wanted)
            (kept if chosen else dropped).append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
        self.events.total(len(kept))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.troubles.append(f"{report.nodeid} cannot be read: {_last_line(report)}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if "[" in nodeid:
            self.events.started(nodeid[nodeid.index("[") + 1 : -1])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        outcome: Any = yield
        report = outcome.get_result()
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._collect(item, call, report)
        elif report.failed:
            self.troubles.append(f"{item.nodeid}: {_last_line(report)}")

    def _collect(
        self, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> None:
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        measure = item.funcargs.get("measure")  # type: ignore[attr-defined]
        if isinstance(measure, Measure):
            row = measure.row
        else:
            row = Row(case.id, case.id.split(".")[0], "", "", case.threads)
        if report.skipped and call.excinfo is not None:
            reason = str(call.excinfo.value)
            if not any(reason in note for note in row.notes):
                row.notes.append(reason)
        elif report.failed and call.excinfo is not None:
            error = call.excinfo.value
            row.ours = row.p20 = row.p80 = None
            row.notes.append(f"failed: {type(error).__name__}: {error}".splitlines()[0])
            self.troubles.append(f"{row.id}: {row.notes[-1]}")
        row.versions = {**self.versions, **row.versions}
        contract.judge(row, self.targets)
        if isinstance(measure, Measure):
            # pytest-benchmark writes this beside its own statistics.
            item.funcargs["benchmark"].extra_info.update(row.to_json())  # type: ignore[attr-defined]
        self.rows.append(row)
        self.events.finished(row)


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
