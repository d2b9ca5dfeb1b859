"""The library of CUDA kernels: built where there is nvcc, loaded at the first call."""

from functools import lru_cache
from pathlib import Path

PATH = Path(__file__).parent / "libquernstone_cuda.so"


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this installation has the kernels; there may be no GPU all the same."""
    return PATH.exists()


def required() -> Path:
    """Where the library is.

    Raises:
        ImportError: it is not part of this installation.
    """
    if not available():
        raise ImportError(
            f"{PATH.name} is not part of this installation: it was built where there was no "
            "nvcc; install the CUDA toolkit 12.8 or newer and build again with "
            "`pip install . -C cmake.define.QS_CUDA=ON`"
        )
    return PATH
