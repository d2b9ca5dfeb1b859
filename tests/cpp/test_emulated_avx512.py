"""The AVX-512 sources on a processor that may not have AVX-512, its intrinsics emulated by SIMDe.

Emulated results say that the code is right, nothing about its speed.
"""

import sys
from pathlib import Path

import pytest
import simde_py

from tests.cpp.conftest import ROOT, build_unit, run

EMULATION = ("QS_EMULATE_AVX512=ON", f"QS_SIMDE_DIR={simde_py.get_include()}")


@pytest.fixture(scope="module")
def emulated_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with emulated AVX-512 levels, in a folder of its own."""
    site = tmp_path_factory.mktemp("emulated")
    definitions = [f"-Ccmake.define.{definition}" for definition in EMULATION]
    build_dir = f"-Cbuild-dir={ROOT / 'build' / 'emulated'}"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "--target", site, build_dir, *definitions, ROOT)
    return site


def test_the_core_keeps_its_promises_with_emulated_avx512() -> None:
    assert " 0 failed" in run(build_unit("unit-emulated", "QS_WERROR=OFF", *EMULATION))


def test_attention_passes_its_tests_with_emulated_avx512(emulated_package: Path) -> None:
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/attention", "-k", "avx512")
    output = run(sys.executable, *tests, PYTHONPATH=str(emulated_package))
    assert " passed" in output, output
