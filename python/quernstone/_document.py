"""JSON documents of the package: whole or absent on the disk, and read with every field checked."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_WORDS: dict[type, str] = {
    bool: "a truth value",
    float: "a number",
    int: "a whole number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def write(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Puts the document in the place of what the path holds, which stays whole until then."""
    content = json.dumps(data, indent=1, allow_nan=False) + "\n"
    target = Path(path).resolve()
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], parse: Callable[[Any], _T]) -> _T:
    """What `parse` makes of the document; a ValueError names the path before the field."""
    content = Path(path).read_bytes()
    try:
        data = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: got no JSON document ({error})") from error
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def body(data: object, form: str, version: int, **types: type) -> dict[str, Any]:
    """The fields of a document of this form and version, beside `format` and `version`."""
    for name, want in (("format", form), ("version", version)):
        got = data.get(name) if isinstance(data, dict) else None
        if type(got) is not type(want) or got != want:
            raise ValueError(f"{name}: got {got!r}, expected {want!r}")
    found = fields(data, "", format=str, version=int, **types)
    return {name: found[name] for name in types}


def fields(data: object, where: str, **types: type) -> dict[str, Any]:
    """The fields of an object, all there and none beside, each of its type."""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'document'}: got {_WORDS[type(data)]}, expected an object")
    prefix = f"{where}." if where else ""
    for name in data:
        if name not in types:
            raise ValueError(f"{prefix}{name}: unknown, expected {', '.join(types)}")
    for name, want in types.items():
        if name not in data:
            raise ValueError(f"{prefix}{name}: missing, expected {_WORDS[want]}")
        got = type(data[name])
        if got is not want and (got, want) != (int, float):
            raise ValueError(f"{prefix}{name}: got {_WORDS[got]}, expected {_WORDS[want]}")
    return dict(data)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found
