"""Builds the C++ test binary; CMake and ninja make a second build cheap."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARY = "quernstone_unit"


def program(name: str) -> str:
    """Path of a program, this Python's environment first."""
    beside_python = Path(sys.executable).parent / name
    found = beside_python if beside_python.exists() else shutil.which(name)
    assert found, f"{name} is not installed; `make test` installs it where it may"
    return str(found)


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{output[-8000:]}"
    return output


def build(name: str, target: str, *definitions: str) -> Path:
    """Builds one target of the C++ tests in build/<name> and gives that folder."""
    directory = ROOT / "build" / name
    cmake = program("cmake")
    ninja = f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"
    options = [f"-D{definition}" for definition in ("QS_TESTS=ON", "QS_WERROR=ON", *definitions)]
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", directory, ninja, *options)
    run(cmake, "--build", directory, "--target", target)
    return directory


def build_unit(name: str, *definitions: str) -> Path:
    """Builds the test binary in build/<name> and gives its path."""
    return build(name, BINARY, *definitions) / BINARY
