"""What is promised exists: every target names a row that some benchmark has."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import quernstone.bench as bench
from quernstone.bench import targets

MODULES = [m.name for m in pkgutil.iter_modules(bench.__path__) if m.name.startswith("bench_")]


def rows_of(module: str) -> set[str]:
    found = set()
    for name, value in vars(importlib.import_module(f"quernstone.bench.{module}")).items():
        marks = getattr(value, "pytestmark", [])
        if name.startswith("bench_") and marks:
            found.update(case.values[0].id for case in marks[0].args[1])
    return found


@pytest.mark.parametrize("vertical", ["attention", "moe", "pim"])
def test_every_promise_has_its_row(vertical: str) -> None:
    ids = set().union(*(rows_of(module) for module in MODULES))
    promised = {t.id for t in targets.load() if t.id.startswith(f"{vertical}.")}
    assert promised
    assert promised <= ids


def test_no_row_stands_twice() -> None:
    every = [row for module in MODULES for row in sorted(rows_of(module))]
    assert len(every) == len(set(every))
