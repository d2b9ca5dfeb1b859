"""What every vertical's tests share: a fixed seed, and each instruction set in one process."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parents[1] / "../shared/data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a skipped test has failed: what it needs should have been installed",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(collector.config, report)
    return report


def _fail_if_skipped(
    config: pytest.Config, report: pytest.TestReport | pytest.CollectReport
) -> None:
    if config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --no-skips: {report.longrepr}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU, unless it is asked for by its mark, or data that is not here."""
    gpu = "gpu" in config.option.markexpr
    left_out = [item for item in items if _is_left_out(item, gpu)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item, gpu: bool) -> bool:
    if item.get_closest_marker("gpu"):
        return not gpu
    data = item.get_closest_marker("data")
    # Continuous integration has the data (.ci/run): there its absence is a failure.
    wanted = "QUERNSTONE_DATA" in os.environ
    return data is not None and not wanted and not (DATA / data.args[0]).is_dir()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `isa` once for each level that this machine and build have."""
    if "isa" in metafunc.fixturenames:
        from quernstone import _core

        metafunc.parametrize("isa", _core.isas(), indirect=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction-set level for the test and gives its name."""
    from quernstone import _core

    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)
