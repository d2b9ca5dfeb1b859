"""The grammar: files become cards, which are lists of lower-case words with a place.

What the words mean is the business of `elements`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quernstone.spice.error import SpiceError

# A chain of files this long includes itself, whatever their names say.
_DEEPEST = 16
# As many files would be no netlist but a chain of files that include each other many times.
_MOST_FILES = 4096
# The place of a card is file << 32 | line.
PLACE_BITS = 32


@dataclass
class Source:
    """Where cards come from: a netlist, and the files that it includes from its own folder."""

    folder: Path | None
    """None: nothing can be included."""
    files: list[str] = field(default_factory=list)
    ended: bool = False
    """A `.end` has been read."""

    def error(self, message: str, place: int) -> SpiceError:
        """The error with the file and line of a place."""
        return SpiceError(message, self.files[place >> PLACE_BITS], place & (1 << PLACE_BITS) - 1)


def cards(
    source: Source, name: str, text: str, *, title: bool, depth: int = 0
) -> Iterator[tuple[list[str], int]]:
    """The cards of a text, includes followed, up to `.end`.

    A line that begins with + continues the card before it; one that begins with * is a comment, as
    is what follows ; or a $ after white space. Parentheses and commas separate words, an equals
    sign is a word.

    Args:
        source: gets the names of files and `ended`.
        name: of the text, for messages.
        title: the first line is a title, whatever it holds.

    Yields:
        The words of a card, and its place.
    """
    place = len(source.files) << PLACE_BITS
    source.files.append(name)
    if len(source.files) > _MOST_FILES:
        raise source.error(f"got more than {_MOST_FILES} included files, expected fewer", place + 1)
    words: list[str] = []
    at = place
    for number, line in enumerate(text.lower().split("\n"), start=1):
        if title and number == 1:
            continue
        first = line[:1]
        if first == "*":
            continue
        if not first.isalpha():
            line = line.lstrip()
            first = line[:1]
            if not first or first in "*;$":
                continue
            if first == "+":
                if not words:
                    raise source.error("got a continuation of no card", place + number)
                words += _split(line[1:])
                continue
        if words:
            if words[0][0] != ".":
                yield words, at
            else:
                yield from _dotted(source, text, words, at, depth)
                if source.ended:
                    return
        words, at = _split(line), place + number
    if words:
        yield from _dotted(source, text, words, at, depth)


def _split(line: str) -> list[str]:
    if ";" in line:
        line = line[: line.index(";")]
    if "$" in line:
        for i, letter in enumerate(line):
            if letter == "$" and (i == 0 or line[i - 1].isspace()):
                line = line[:i]
                break
    if "(" in line or "," in line or ")" in line:
        line = line.replace("(", " ").replace(")", " ").replace(",", " ")
    if "=" in line:
        line = line.replace("=", " = ")
    return line.split()


def _dotted(
    source: Source, text: str, words: list[str], at: int, depth: int
) -> Iterator[tuple[list[str], int]]:
    """The card, or what stands in the file that it includes; nothing of .end."""
    first = words[0]
    if first == ".end":
        source.ended = True
        return
    if first not in (".include", ".inc"):
        yield words, at
        return
    if len(words) != 2:
        raise source.error(f"{first}: got {len(words) - 1} words, expected the name of a file", at)
    if depth + 1 >= _DEEPEST:
        raise source.error(f"{first}: got files {_DEEPEST} deep, expected no circle", at)
    name = _as_spelt(text, at & (1 << PLACE_BITS) - 1, words[1]).strip("'\"")
    try:
        path = _confined(source, name, at)
        if path.exists() and not path.is_file():
            raise source.error(f"{first}: {name}: got a folder or device, expected a file", at)
        included = read_text(path)
    except OSError as error:
        raise source.error(f"{first}: {name}: {error.strerror or error}", at) from error
    except RuntimeError as error:  # links that lead to each other, before Python 3.13
        what = f"{first}: {name}: got a circle of links, expected a file"
        raise source.error(what, at) from error
    yield from cards(source, str(path), included, title=False, depth=depth + 1)


def _confined(source: Source, name: str, at: int) -> Path:
    """The file, which lies in the netlist's folder, links followed."""
    if source.folder is None:
        raise source.error(f".include: got {name!r}, expected none in a text without a folder", at)
    folder = source.folder.resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise source.error(
            f".include: got {name!r}, expected a file in the netlist's folder {folder}", at
        )
    return path


def _as_spelt(text: str, line: int, word: str) -> str:
    """A lower-case word of a line with the capitals that it is written with."""
    written = _split(text.split("\n")[line - 1])
    return next((other for other in written if other.lower() == word), word)


def read_text(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz.

    Raises:
        SpiceError: a packed file that is damaged or cut off, or one that holds no text.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SpiceError(f"got a damaged or truncated gzip file: {error}", str(path)) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise SpiceError("got a zero byte, expected text", str(path), line)
    return text.replace("\r\n", "\n").replace("\r", "\n")
