"""The text that tinylm learns: the documentation inside Python's own standard library.

Nothing is downloaded and no module is imported: docstrings are read from the source files, the
language reference from `pydoc_data.topics`. One version of Python gives one text, but for what a
distribution has patched or left out; its hash is part of every result.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = "held-out"
TRAIN = "train"

START = 0
"""The byte that begins every sequence: it stands in no text, so the first token is told apart."""

# What a distribution may pack apart, tests, and tables with hardly a sentence. Beside them, only
# what Python itself counts as standard library: its folder may hold more.
_LEFT_OUT = {
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "venv",
}


class NoText(RuntimeError):
    """This Python has no readable standard library."""


@dataclass(frozen=True)
class Corpus:
    """The documents by name, apart for training and for measuring."""

    train: dict[str, str]
    held_out: dict[str, str]

    def text(self, split: str) -> bytes:
        """The documents of a split in the order of their names, a blank line between them.

        Raises:
            ValueError: a split that is neither "train" nor "held-out".
        """
        if split not in (TRAIN, HELD_OUT):
            raise ValueError(f"split: got {split!r}, expected {TRAIN!r} or {HELD_OUT!r}")
        documents = self.train if split == TRAIN else self.held_out
        return "\n\n".join(documents[name] for name in sorted(documents)).encode()

    @functools.cached_property
    def sha256(self) -> str:
        """Of both splits: equal where the text and its division are."""
        digest = hashlib.sha256()
        for split in (TRAIN, HELD_OUT):
            text = self.text(split)
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()

    def describe(self) -> dict[str, str | int]:
        """What a result has to name to be compared with another."""
        return {
            "python": platform.python_version(),
            "sha256": self.sha256,
            "train_bytes": len(self.text(TRAIN)),
            "held_out_bytes": len(self.text(HELD_OUT)),
        }


@functools.cache
def documentation() -> Corpus:
    """The corpus of the running Python.

    A document belongs to the held-out split by the hash of its name, one of ten. A passage (a
    docstring, a section of a topic) that stands twice is kept once, in the training split
    where it stands in both: nothing that is measured was learnt by heart.

    Raises:
        NoText: the standard library has no source files.
    """
    with _no_collection():
        found = dict(sorted([*_modules(Path(sysconfig.get_path("stdlib"))), *_topics()]))
    if sum(len(passage) for passages in found.values() for passage in passages) < 100_000:
        raise NoText(
            f"{sys.executable}: got a standard library without its source files or without "
            "pydoc_data, expected the documentation that they hold"
        )
    seen: set[str] = set()
    splits: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for wanted in (False, True):
        for name, passages in found.items():
            if is_held_out(name) is not wanted:
                continue
            fresh = [p for p in dict.fromkeys(passages) if p not in seen]
            seen.update(fresh)
            if fresh:
                splits[wanted][name] = "\n\n".join(fresh)
    return Corpus(*splits)


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def _modules(library: Path) -> Iterator[tuple[str, list[str]]]:
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or not _LEFT_OUT.isdisjoint(parts):
            continue
        passages = list(_docstrings(path.read_bytes()))
        if passages:
            yield ".".join(parts), passages


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(source)
    for node in sorted(_documented(tree), key=lambda node: getattr(node, "lineno", 0)):
        text = (ast.get_docstring(node) or "").replace("\0", "").strip()
        if text:
            yield text


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """The definitions within a node; expressions hold none and are passed over."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees are millions of objects without a circle, through which Python would search."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in topics.items():
        yield f"topics.{name}", [part.strip() for part in text.split("\n\n\n") if part.strip()]
