"""Loads the compiled core beside torch and holds what a process can set: its instruction sets."""

import os
from pathlib import Path

import torch  # before the core, which binds to the libraries that torch has loaded

try:
    from quernstone import _core
except ImportError as error:
    raise ImportError(
        f"quernstone._core, the compiled part, does not load ({error}); "
        "build it with: pip install ."
    ) from error

__version__: str = _core.build_info()["version"]


def isa() -> str:
    """Instruction-set level in use: baseline, avx2, avx512, avx512_bf16_vnni or
    avx512_amx."""
    return _core.isa()


def isas() -> list[str]:
    """Levels that this processor and this build have, lowest first."""
    return _core.isas()


def set_isa(name: str) -> None:
    """Take another instruction-set level from now on, in the whole process.

    Raises:
        ValueError: the level is unknown, or this processor does not have it.
    """
    _core.set_isa(name)


def num_threads() -> int:
    """Threads that a call uses: those of torch's pool (``torch.set_num_threads``)."""
    return _core.num_threads()


def _load() -> None:
    wanted = os.environ.get("QUERNSTONE_ISA")
    if wanted:
        try:
            _core.set_isa(wanted)
        except (ValueError, TypeError):
            raise ImportError(
                f"QUERNSTONE_ISA: got {wanted!r}, expected one of {_core.isas()}"
            ) from None
    libraries = Path(torch.__file__).parent / "lib"
    suffix = ".dylib" if (libraries / "libtorch_cpu.dylib").exists() else ".so"
    _core.load_torch(str(libraries / f"libtorch_cpu{suffix}"))


_load()
