"""Instruction-set levels: found, forced, capped by the environment, and refused in a sentence."""

import os
import subprocess
import sys

import pytest
import torch

import quernstone
from quernstone import _core
from quernstone.attention import sink_attention

from . import tolerances
from .cases import Case, split

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16_vnni", "avx512_amx"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_levels_are_the_lowest_of_five_in_order() -> None:
    levels = _core.isas()
    assert levels
    assert levels == LEVELS[: len(levels)]
    assert quernstone.isas() == levels


def test_the_highest_level_is_taken_at_import() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "QUERNSTONE_ISA"}
    code = "from quernstone import _core; print(_core.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == _core.isas()[-1]


def test_a_forced_level_is_the_one_in_use(isa: str) -> None:
    assert _core.isa() == quernstone.isa() == isa


def test_each_level_runs_its_own_code() -> None:
    (q, k, v), options = Case(queries=64, keys=64, width=64, aux=False).make()
    before = _core.isa()
    results = []
    for level in _core.isas():
        _core.set_isa(level)
        out, _ = split(sink_attention(q, k, v, **options))
        results.append(out)
    _core.set_isa(before)
    for out in results[1:]:
        difference = tolerances.relative_error(out, results[0])
        assert difference <= 2 * tolerances.output(torch.float32)
    assert len(results) == 1 or not torch.equal(results[0], results[-1])


@pytest.mark.parametrize("name", ["avx", "AVX2", "", "sse2"])
def test_an_unknown_level_is_refused_and_changes_nothing(name: str) -> None:
    before = _core.isa()
    with pytest.raises(ValueError, match=rf"got '{name}', expected .*baseline"):
        quernstone.set_isa(name)
    assert _core.isa() == before


def test_a_level_that_the_machine_lacks_is_refused() -> None:
    for name in LEVELS[len(_core.isas()) :]:
        with pytest.raises(ValueError, match=rf"got '{name}', expected .*baseline"):
            _core.set_isa(name)


def test_the_environment_caps_the_level() -> None:
    done = python("from quernstone import _core; print(_core.isa())", QUERNSTONE_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


@pytest.mark.parametrize("level", ["avx1024", *LEVELS[len(_core.isas()) :][-1:]])
def test_the_environment_names_no_such_level_and_one_sentence_says_so(level: str) -> None:
    done = python("import quernstone", QUERNSTONE_ISA=level)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: QUERNSTONE_ISA: ")
    assert f"got '{level}', expected one of ['baseline'" in last
