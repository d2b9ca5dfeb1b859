"""Real text that every machine has: the documentation of Python's standard library."""

from __future__ import annotations

import importlib
import inspect

MODULES = (
    "argparse asyncio collections contextlib csv dataclasses datetime decimal difflib enum "
    "fractions functools heapq http.client inspect itertools json logging pathlib pickle random "
    "re shutil sqlite3 statistics string subprocess tarfile tempfile textwrap threading typing "
    "unittest urllib.request xml.etree.ElementTree zipfile"
).split()


def paragraphs(least: int = 40) -> list[str]:
    """Docstrings of at least so many characters, module by module, members by name."""
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module, *(getattr(module, key) for key in sorted(vars(module)))]
        for member in members:
            mine = member is module or getattr(member, "__module__", None) == name
            text = inspect.getdoc(member) if mine else None
            if text and len(text) >= least:
                found.setdefault(text)
    return list(found)


def sentences(count: int) -> list[str]:
    """First lines of docstrings, of varied length."""
    lines = dict.fromkeys(text.strip().splitlines()[0] for text in paragraphs())
    return list(lines)[:count]


def text(characters: int) -> str:
    """Running text of at least that many characters."""
    pieces: list[str] = []
    length = 0
    for paragraph in paragraphs():
        pieces.append(paragraph)
        length += len(paragraph) + 2
        if length >= characters:
            return "\n\n".join(pieces)
    raise ValueError(f"the standard library documents {length} characters, asked {characters}")
