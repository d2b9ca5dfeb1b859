"""The fake stage is a fixture of every test here."""

from tests.bench.fakes import stage

__all__ = ["stage"]
