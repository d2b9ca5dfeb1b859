"""Kinds of files: files of many formats, made or read from the standard library, for Magika.

Source of the features: the paper (arXiv 2409.13768), section 4, and the settings that the model's
package brings.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import importlib.util
import io
import json
import lzma
import marshal
import pickle
import sqlite3
import sysconfig
import tarfile
import wave
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone.bench.fidelity.common import SPLITS, Network, Split, run, seed, words
from quernstone.importers.models import MAGIKA, package_file

_BEGIN, _END, _BLOCK = 1024, 1024, 4096
_PADDING = 256


@functools.cache
def files(split: Split, each: int = 10) -> tuple[tuple[str, bytes], ...]:
    """Files with the label that they ought to have.

    Args:
        each: files of a format.
    """
    random = np.random.default_rng(seed(split, 83))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [path for path in sources if path.stat().st_size > 2000]
    # Each split has its own modules.
    sources = sources[SPLITS.index(split) :: len(SPLITS)]
    picked = [sources[i] for i in random.permutation(len(sources))]
    text = list(words(split))
    found = [("python", path.read_bytes()) for path in picked[: 4 * each]]
    for label, make in _MAKE.items():
        for _ in range(each):
            begin = int(random.integers(len(text) - 400))
            found.append((label, make(text[begin : begin + 400], random)))
    for _ in range(each):
        path = picked[int(random.integers(len(picked)))]
        found += list(_packed(path))
    return tuple(found)


def inputs(contents: list[bytes]) -> dict[str, Tensor]:
    """The bytes of files as Magika takes them, [n, 2048]."""
    rows = np.full((len(contents), _BEGIN + _END), _PADDING, np.int32)
    for row, content in zip(rows, contents, strict=True):
        first = content[:_BLOCK].lstrip()[:_BEGIN]
        last = content[-_BLOCK:].rstrip()[-_END:]
        row[: len(first)] = np.frombuffer(first, np.uint8)
        row[_BEGIN + _END - len(last) :] = np.frombuffer(last, np.uint8)
    return {"bytes": torch.from_numpy(rows)}


def labels() -> tuple[str, ...]:
    """What the classes stand for."""
    text = package_file(MAGIKA, "standard_v3_3/config.min.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["target_labels_space"])


def decisions(network: Network, split: Split = "held-out") -> NDArray[np.int64]:
    """The most probable class of each of `files`."""
    (rows,) = inputs([content for _, content in files(split)]).values()
    # A few at a time: what is computed stays in the cache.
    parts = [next(iter(run(network, {"bytes": part}).values())) for part in rows.split(8)]
    found: NDArray[np.int64] = torch.cat(parts).argmax(-1).numpy()
    return found


def agreement(base: Network, changed: Network, split: Split = "held-out") -> float:
    """The share of files on which both networks decide alike."""
    return float((decisions(base, split) == decisions(changed, split)).mean())


def accuracy(network: Network, split: Split = "held-out") -> float:
    """The share of files that get the label that they ought to have."""
    names = labels()
    pairs = zip(decisions(network, split), files(split), strict=True)
    return float(np.mean([names[got] == want for got, (want, _) in pairs]))


def _packed(path: Path) -> Iterator[tuple[str, bytes]]:
    """A module in several containers."""
    source = path.read_bytes()
    yield "gzip", gzip.compress(source, mtime=0)
    yield "bzip", bz2.compress(source)
    yield "xz", lzma.compress(source)
    yield "zlibstream", zlib.compress(source)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(path.name), source)
    yield "zip", buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tape:
        info = tarfile.TarInfo(path.name)
        info.size = len(source)
        tape.addfile(info, io.BytesIO(source))
    yield "tar", buffer.getvalue()
    header = importlib.util.MAGIC_NUMBER + bytes(12)
    yield "pythonbytecode", header + marshal.dumps(compile(source, path.name, "exec"))


def _text(words: list[str], _: np.random.Generator) -> bytes:
    return " ".join(words).encode()


def _json(words: list[str], random: np.random.Generator) -> bytes:
    rows = [
        {"name": word, "size": int(random.integers(999)), "tags": words[i : i + 2]}
        for i, word in enumerate(words[:60])
    ]
    return json.dumps({"version": 1, "entries": rows}, indent=2).encode()


def _csv(words: list[str], random: np.random.Generator) -> bytes:
    buffer = io.StringIO()
    rows = csv.writer(buffer)
    rows.writerow(["id", "name", "price", "count"])
    for i, word in enumerate(words[:80]):
        rows.writerow([i, word, f"{random.uniform(1, 99):.2f}", random.integers(50)])
    return buffer.getvalue().encode()


def _xml(words: list[str], random: np.random.Generator) -> bytes:
    root = ElementTree.Element("catalogue")
    for i, word in enumerate(words[:60]):
        item = ElementTree.SubElement(root, "item", id=str(i), weight=str(random.integers(99)))
        ElementTree.SubElement(item, "title").text = word
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8", xml_declaration=True)


def _html(words: list[str], _: np.random.Generator) -> bytes:
    parts = [" ".join(words[i : i + 20]).replace("<", "&lt;") for i in range(0, 200, 20)]
    body = "\n".join(f'<p class="text">{part}</p>' for part in parts)
    head = "<head><title>Page</title><style>p { margin: 0 }</style></head>"
    return f"<!DOCTYPE html>\n<html>\n{head}\n<body>\n{body}\n</body>\n</html>\n".encode()


def _ini(words: list[str], random: np.random.Generator) -> bytes:
    names = [word for word in words if word.isalnum()]
    rows = [f"[{names[0]}]"]
    for i, word in enumerate(names[1:60]):
        rows.append(f"{word.lower()} = {random.integers(999)}")
        if i % 8 == 7:
            rows += ["", f"[{word}]"]
    return "\n".join(rows).encode()


def _email(words: list[str], _: np.random.Generator) -> bytes:
    message = EmailMessage()
    message["From"], message["To"] = "a@example.org", "b@example.org"
    message["Subject"] = " ".join(words[:5])
    message["Date"] = "Mon, 02 Jan 2023 10:00:00 +0000"
    message["Message-ID"] = "<1@example.org>"
    message.set_content(" ".join(words[5:200]))
    return bytes(message)


def _pickle(words: list[str], _: np.random.Generator) -> bytes:
    return pickle.dumps({"words": words, "lengths": [len(word) for word in words]})


def _sqlite(words: list[str], _: np.random.Generator) -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE words (id INTEGER PRIMARY KEY, word TEXT)")
    base.executemany("INSERT INTO words (word) VALUES (?)", [(word,) for word in words])
    base.commit()
    content = base.serialize()
    base.close()
    return content


def _wave(_: list[str], random: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes((2000 * random.normal(size=4000)).astype("<i2").tobytes())
    return buffer.getvalue()


def _picture(kind: str) -> Callable[[list[str], np.random.Generator], bytes]:
    def make(_: list[str], random: np.random.Generator) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        ramp = np.add.outer(np.arange(64), np.arange(64)) + random.integers(0, 40, (64, 64))
        Image.fromarray(ramp.astype(np.uint8)).save(buffer, kind)
        return buffer.getvalue()

    return make


def _array(_: list[str], random: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, random.normal(size=400))
    return buffer.getvalue()


_MAKE: dict[str, Callable[[list[str], np.random.Generator], bytes]] = {
    "txt": _text,
    "json": _json,
    "csv": _csv,
    "xml": _xml,
    "html": _html,
    "ini": _ini,
    "eml": _email,
    "pickle": _pickle,
    "sqlite": _sqlite,
    "wav": _wave,
    "png": _picture("png"),
    "gif": _picture("gif"),
    "bmp": _picture("bmp"),
    "jpeg": _picture("jpeg"),
    "npy": _array,
}
