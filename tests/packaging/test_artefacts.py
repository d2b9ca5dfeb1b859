"""What is inside the sdist and the wheel, and what the wheel asks of a machine."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.packaging.conftest import Artefacts, Environment


@pytest.fixture(scope="session")
def wheel_names(artefacts: Artefacts) -> list[str]:
    with zipfile.ZipFile(artefacts.wheel) as wheel:
        return wheel.namelist()


@pytest.fixture(scope="session")
def sdist_names(artefacts: Artefacts) -> list[str]:
    with tarfile.open(artefacts.sdist) as sdist:
        return [name.partition("/")[2] for name in sdist.getnames()]


def test_torch_is_not_needed_to_build(build_environment: Environment, artefacts: Artefacts) -> None:
    probe = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))"
    assert build_environment.run(build_environment.python, "-c", probe).split() == ["None"] * 2
    assert artefacts.wheel.exists()


@pytest.mark.parametrize(
    "name",
    [
        "quernstone/__init__.py",
        "quernstone/py.typed",
        "quernstone/attention/api.py",
        "quernstone/kernels/__init__.py",
        "quernstone/bench/__init__.py",
        "quernstone/bench/targets.toml",
        "quernstone/bench/cases/attention.py",
        "quernstone/bench/study/recorded.json",
        "quernstone/bench/tinylm/checkpoints/sink-balance.npz",
    ],
)
def test_the_wheel_holds(wheel_names: list[str], name: str) -> None:
    assert name in wheel_names


def test_the_wheel_holds_one_compiled_module_and_the_cuda_kernels_where_nvcc_is(
    wheel_names: list[str],
) -> None:
    module, *others = sorted(name for name in wheel_names if name.endswith(".so"))
    assert module.startswith("quernstone/_core.")
    assert others in ([], ["quernstone/libquernstone_cuda.so"])
    assert others or shutil.which("nvcc") is None


def test_the_wheel_holds_the_licence(wheel_names: list[str]) -> None:
    assert any(re.fullmatch(r".*\.dist-info/licenses/LICENSE", name) for name in wheel_names)


def test_the_wheel_leaves_out_records_and_what_only_a_developer_needs(
    wheel_names: list[str],
) -> None:
    unwanted = re.compile(r"bench/results/|__pycache__|^tests/|^csrc/|\.(cpp|inl|cu|jsonl)$")
    assert not [name for name in wheel_names if unwanted.search(name)]


def test_the_wheel_runs_on_any_linux_with_glibc_2_34(artefacts: Artefacts) -> None:
    show = [sys.executable, "-m", "auditwheel", "show", str(artefacts.wheel)]
    report = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    tag = re.search(r"platform\s+tag:\s+\"manylinux_2_(\d+)_", report)
    assert tag, report
    assert int(tag[1]) <= 34, report


@pytest.mark.parametrize(
    "name",
    ["CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "tests/conftest.py"],
)
def test_the_sdist_holds(sdist_names: list[str], name: str) -> None:
    assert name in sdist_names


def test_the_sdist_leaves_out_what_was_built(sdist_names: list[str]) -> None:
    unwanted = re.compile(r"^(\.venv|build|dist|out|\.git)/|__pycache__|\.so$")
    assert not [name for name in sdist_names if unwanted.search(name)]
