"""Rows that are kept, and comparisons with another commit: both need a clone."""

import json
import subprocess
from pathlib import Path

import pytest

from quernstone.bench import base, record
from quernstone.bench.rows import Row
from quernstone.bench.run import Results


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "targets.toml").write_text("")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        (*identity, "commit", "--quiet", "--message=first"),
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_clone_is_found_from_any_folder_inside(clone: Path) -> None:
    assert record.checkout(clone / "bench") == clone.resolve()


def test_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(record.NotACheckout, match="not in a git clone of quernstone"):
        record.checkout(tmp_path)
    with pytest.raises(record.NotACheckout):
        base.compare("HEAD", [], tmp_path)


def test_an_unknown_commit_is_named(clone: Path) -> None:
    with pytest.raises(base.BaseFailed, match="cannot check no-such-ref out"):
        base.compare("no-such-ref", [], clone)


def test_recorded_rows_carry_commit_and_machine(clone: Path) -> None:
    rows = [
        Row("fake.a.t1", "fake", "a", "ms", 1, ours=1.0),
        Row("fake.b.t1", "fake", "never ran", "ms", 1),
        Row("machine.mm", "machine", "mm", "GF/s", 1, ours=9.0),
    ]
    results = Results(rows, {"cpu": "C", "build": {"compiler": "g++"}})
    for _ in range(2):
        written = record.append(results, clone)
    assert [path.name for path in written] == ["fake.jsonl", "machine.jsonl"]
    lines = [json.loads(line) for line in written[0].read_text().splitlines()]
    assert [line["id"] for line in lines] == ["fake.a.t1", "fake.a.t1"]
    assert lines[0]["commit"] == record.commit(clone).removesuffix("+")
    assert lines[0]["machine"]["build"] == {"compiler": "g++"}


def test_a_commit_with_changes_is_marked(clone: Path) -> None:
    assert not record.commit(clone).endswith("+")
    (clone / "bench" / "targets.toml").write_text("# changed\n")
    assert record.commit(clone).endswith("+")
