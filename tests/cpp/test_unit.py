"""The C++ tests, on this machine and as the portable path on another instruction set."""

from pathlib import Path

from tests.cpp.conftest import build_unit, program, run


def test_the_core_keeps_its_promises_on_this_machine() -> None:
    assert " 0 failed" in run(build_unit("unit"))


def test_the_portable_path_keeps_its_promises_on_aarch64() -> None:
    compiler = program("aarch64-linux-gnu-g++")
    binary: Path = build_unit(
        "unit-aarch64",
        "CMAKE_SYSTEM_NAME=Linux",
        "CMAKE_SYSTEM_PROCESSOR=aarch64",
        f"CMAKE_CXX_COMPILER={compiler}",
        "CMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert " 0 failed" in run(program("qemu-aarch64"), binary)
