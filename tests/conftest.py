"""What every vertical's tests share: a fixed seed, and each instruction set in one process."""

from collections.abc import Iterator

import pytest
import torch


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
