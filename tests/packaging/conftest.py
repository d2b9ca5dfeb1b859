"""Environments that hold the distributions named and nothing else, and the built artefacts."""

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(names: Iterable[str]) -> list[Requirement]:
    return [Requirement(name) for name in names]


def closure(wanted: list[Requirement]) -> set[str]:
    """Names of all distributions that the requirements bring along."""
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    while queue:
        requirement, extra = queue.pop()
        if (requirement.name, extra) in seen:
            continue
        seen.add((requirement.name, extra))
        for needed in requirements(distribution(requirement.name).requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                queue += [(needed, inner) for inner in ("", *needed.extras)]
    return {name for name, _ in seen}


class Environment:
    """A virtual environment outside the repository.

    The distributions come as links to the ones already installed: no gigabytes are fetched again,
    and what the requirements do not declare cannot be imported.
    """

    def __init__(self, folder: Path, wanted: list[Requirement]) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.bin = self.python.parent
        minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "venv" / "lib" / minor / "site-packages"
        for name in closure(wanted):
            found = distribution(name)
            tops = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
            for top in tops:
                link = site / top
                if not link.exists():
                    link.symlink_to(Path(str(found.locate_file(top))))

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Output of a command that has to succeed, run from the environment's own folder."""
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or self.folder,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder), "COLUMNS": "200"},
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{output[-8000:]}"
        return output


@dataclass(frozen=True)
class Artefacts:
    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def build_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What `pip install .` would build in: the declared build requirements, hence no torch."""
    declared = requirements([*PROJECT["build-system"]["requires"], "cmake", "ninja"])
    return Environment(tmp_path_factory.mktemp("build-environment"), declared)


@pytest.fixture(scope="session")
def artefacts(build_environment: Environment) -> Artefacts:
    """The sdist, and the wheel built from the unpacked sdist."""
    folder = build_environment.folder
    python = build_environment.python
    hook = "import sys, scikit_build_core.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    build_environment.run(python, "-c", hook, "build_sdist", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    build_environment.run("tar", "xzf", sdist)
    source = folder / re.sub(r"\.tar\.gz$", "", sdist.name)
    build_environment.run(python, "-c", hook, "build_wheel", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return Artefacts(sdist, wheel)


@pytest.fixture(scope="session")
def clean_environment(
    tmp_path_factory: pytest.TempPathFactory, artefacts: Artefacts
) -> Environment:
    """The wheel with the extra of its vertical, away from the repository and without models."""
    project = PROJECT["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["attention"]]
    environment = Environment(tmp_path_factory.mktemp("elsewhere"), requirements(declared))
    pip = (sys.executable, "-m", "pip", "--python", environment.python, "install", "--quiet")
    environment.run(*pip, "--no-deps", "--no-index", artefacts.wheel)
    return environment
