"""Documents on the disk: whole or absent, and every fault in them named."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from quernstone import _document

GOOD = {"format": "test", "version": 2, "name": "ü", "rate": 1.5, "items": [1], "more": {}}
FIELDS: dict[str, type] = {"name": str, "rate": float, "items": list, "more": dict}


def parse(data: object) -> dict[str, Any]:
    return _document.body(data, "test", 2, **FIELDS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _document.write(tmp_path / "a.json", GOOD)
    want = {name: GOOD[name] for name in FIELDS}
    assert _document.read(tmp_path / "a.json", parse) == want
    assert _document.read(str(tmp_path / "a.json"), parse) == want


def test_a_whole_number_stands_for_a_number() -> None:
    assert parse(GOOD | {"rate": 3})["rate"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tests"}, "format: got 'tests', expected 'test'"),
        ({"version": 1}, "version: got 1, expected 2"),
        ({"version": 2.0}, "version: got 2.0, expected 2"),
        ({"version": True}, "version: got True, expected 2"),
        ({"name": 3}, "name: got a whole number, expected a string"),
        ({"name": None}, "name: got null, expected a string"),
        ({"rate": "1"}, "rate: got a string, expected a number"),
        ({"rate": True}, "rate: got a truth value, expected a number"),
        ({"items": {}}, "items: got an object, expected a list"),
        ({"more": []}, "more: got a list, expected an object"),
        ({"extra": 1}, "extra: unknown, expected format, version, name, rate, items, more"),
    ],
)
def test_names_the_field_that_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        parse(GOOD | change)


@pytest.mark.parametrize("name", GOOD)
def test_names_the_field_that_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: (missing, expected a|got None, expected)"):
        parse({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("data", [None, [], "text", 3, 1.5, True])
def test_what_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="format: got None, expected 'test'"):
        parse(data)
    with pytest.raises(ValueError, match=r"items\[2\]: got .*, expected an object"):
        _document.fields(data, "items[2]", name=str)


def test_a_document_cut_off_anywhere_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    _document.write(path, GOOD)
    content = path.read_bytes()
    for end in range(len(content.rstrip())):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"cut\.json: got no JSON document"):
            _document.read(path, parse)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rate": NaN}', "NaN is no number of JSON"),
        (b'{"rate": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"rate": 1, "rate": 2}', "field 'rate' stands twice"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"", "Expecting value"),
        (b"{}{}", "Extra data"),
    ],
)
def test_what_is_no_json_is_refused_by_its_path(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.json: got no JSON document \(.*{message}"):
        _document.read(path, parse)


def test_the_path_stands_before_the_field(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(GOOD | {"version": 1}))
    with pytest.raises(ValueError, match=r"old\.json: version: got 1, expected 2"):
        _document.read(path, parse)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _document.read(tmp_path / "none.json", parse)


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_fault_while_writing_leaves_the_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "kept.json"
    _document.write(path, GOOD)
    if fault == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _document.write(path, {"other": 1})
    assert json.loads(path.read_text()) == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            _document.write(tmp_path / "never.json", {"rate": value})
    assert not list(tmp_path.iterdir())


def test_a_new_file_has_the_usual_permissions_and_a_link_stays_one(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    (tmp_path / "link.json").symlink_to("real.json")
    _document.write(tmp_path / "link.json", GOOD)
    assert (tmp_path / "link.json").is_symlink()
    mode = (tmp_path / "real.json").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(usual.stat().st_mode)
