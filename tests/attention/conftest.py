"""One thread, unless a test asks for more."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restores torch's number of threads too.

    The tensors here are so small that a second thread costs more than it gives, several times so
    on a busy machine; what threads may not change is tested in its own place.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
