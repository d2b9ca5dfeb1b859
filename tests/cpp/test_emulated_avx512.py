"""The AVX-512 and AMX sources on a processor that may have neither, their intrinsics emulated.

Emulated results say that the code is right, nothing about its speed.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import simde_py

from tests.cpp.conftest import ROOT, run

LEVELS = ("avx512", "avx512_bf16_vnni", "avx512_amx")
# Side by side, about as long as each other.
KERNELS = (("tests/attention",), ("tests/gemm", "tests/moe", "tests/pim"))


@pytest.fixture(scope="module")
def emulated_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with emulated AVX-512 levels, in a folder of its own."""
    site = tmp_path_factory.mktemp("emulated")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    settings = (
        f"-Cbuild-dir={ROOT / 'build' / 'emulated'}",
        "-Ccmake.define.QS_CUDA=OFF",
        "-Ccmake.define.QS_EMULATE_AVX512=ON",
        f"-Ccmake.define.QS_SIMDE_DIR={simde_py.get_include()}",
    )
    run(*pip, "--no-index", "--target", site, *settings, ROOT)
    return site


def test_kernels_pass_their_tests_at_the_emulated_levels(emulated_package: Path) -> None:
    # Threads that wait for each other leave the processor to the other half.
    environment = {"PYTHONPATH": str(emulated_package), "OMP_WAIT_POLICY": "passive"}
    probe = "from quernstone import _core; print(*_core.isas())"
    levels = run(sys.executable, "-c", probe, **environment).split()
    assert set(LEVELS) <= set(levels)

    def tested(folders: Sequence[str]) -> str:
        how = ("-q", "-p", "no:cacheprovider", "--no-skips", "-k", "avx512")
        tests = ("-m", "pytest", *how, *folders)
        return run(sys.executable, *tests, **environment)

    with ThreadPoolExecutor(len(KERNELS)) as pool:
        for output in pool.map(tested, KERNELS):
            assert " passed" in output, output
