"""Promises about the repository's files themselves."""

import re
import subprocess

import pytest
from packaging.requirements import Requirement

from quernstone.bench.optional import MODELS
from tests.packaging.conftest import PROJECT, ROOT, requirements

EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def pins(name: str) -> dict[str, Requirement]:
    """The requirements of a file, by distribution."""
    lines = (ROOT / name).read_text().splitlines()
    wanted = requirements(line for line in lines if line and not line.startswith("#"))
    return {requirement.name: requirement for requirement in wanted}


def test_every_dependency_is_pinned_to_a_version_that_the_package_accepts() -> None:
    pinned = pins("requirements-dev.txt")
    declared = [
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        *(name for extra in EXTRAS.values() for name in extra),
    ]
    for requirement in requirements(declared):
        if requirement.name == PROJECT["project"]["name"]:
            continue
        assert requirement.name in pinned, requirement
        (pin,) = pinned[requirement.name].specifier
        assert pin.operator == "==", pin
        assert requirement.specifier.contains(pin.version), (requirement, pin)
        assert requirement.marker == pinned[requirement.name].marker


def test_the_extra_all_holds_every_vertical() -> None:
    (everything,) = requirements(EXTRAS["all"])
    assert everything.extras == set(EXTRAS) - {"all", "test"}


@pytest.mark.parametrize("name", [*MODELS, "kt-kernel", "ik-llama-cpp-python"])
def test_models_and_bulky_rivals_are_in_no_extra(name: str) -> None:
    declared = requirements(entry for extra in EXTRAS.values() for entry in extra)
    assert name not in {requirement.name for requirement in declared}
    assert name not in pins("requirements-dev.txt")


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    machine_path = re.compile(rb"(?<![\w.~$)}/-])/(?:home|root|Users|work|mnt|opt)/\w")
    found = []
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file():
            lines = path.read_bytes().splitlines()
            found += [(name, line) for line in lines if machine_path.search(line)]
    assert not found
