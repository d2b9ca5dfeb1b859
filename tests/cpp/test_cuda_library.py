"""The CUDA library as it was built: what nvcc's assembler says of it, without a GPU."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import triton.backends.nvidia

import quernstone
from tests.cpp.conftest import run

LIBRARY = Path(quernstone.__file__).parent / "libquernstone_cuda.so"
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# Three blocks of four warps of attention on an SM with 65536 registers, eight of which are handed
# out at a time, and two blocks of eight warps of experts.
MOST_REGISTERS = {"decode": 168, "experts": 128}


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack, shared and local memory by architecture and kernel; empty without nvcc."""
    if not LIBRARY.exists():
        assert shutil.which("nvcc") is None, "there is nvcc, and no library was built"
        return {}
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = kernel = ""
    for line in run(CUOBJDUMP, "-res-usage", LIBRARY).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            numbers = re.findall(r"(\w+):(\d+)", line)
            found[arch, kernel] = {name: int(number) for name, number in numbers}
    architectures = {arch for arch, _ in found}
    assert architectures >= {"sm_80", "sm_90"}
    assert len(found) == 26 * len(architectures), (
        "attention: 9 partial, 3 merge and 1 importance kernel; experts: 1 that quantises, and for "
        "2 formats and 3 numbers of tokens a kernel for gate and up and one for down"
    )
    return found


def test_no_kernel_spills_registers(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    spilling = {name: use for name, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not spilling


def test_no_kernel_needs_more_registers_than_its_blocks_leave_it(
    resources: dict[tuple[str, str], dict[str, int]],
) -> None:
    for (_, kernel), use in resources.items():
        (most,) = (limit for name, limit in MOST_REGISTERS.items() if name in kernel)
        assert use["REG"] <= most, kernel


def test_the_library_is_small_and_loads_without_a_driver() -> None:
    if LIBRARY.exists():
        assert LIBRARY.stat().st_size < 3 * 2**20
        library = ctypes.CDLL(str(LIBRARY))
        for struct_bytes in (
            library.qs_attention_decode_struct_bytes,
            library.qs_experts_struct_bytes,
        ):
            struct_bytes.restype = ctypes.c_int64
            assert struct_bytes() > 0
