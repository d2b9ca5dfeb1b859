"""Packed experts of a model in one file, to be mapped into memory as they are.

    0      "QSEXPERT", version, bytes and CRC-32 of the index, where it begins   (64 bytes)
    4096   the packed experts of each layer, each beginning at a multiple of 4096
    ...    the index: JSON, of each layer its name, shape, offset and CRC-32

The first 64 bytes are written last, so that a file whose writing was cut short is told apart.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from quernstone._files import replacing
from quernstone.moe.experts import Experts, ExpertsShape
from quernstone.quant.linear import allocate_bytes

Memory = Literal["map", "copy", "huge"]
"""`map`: the file itself, read as it is used, shared by processes. `copy`: into memory. `huge`:
into pages of 2 MiB, where the system gives such: the fastest to compute from.

A mapped file must stay as it is. One that is cut short or written to is told before the next use
of its experts, by an OSError; one that is cut short while they are computed ends the process with
SIGBUS, which nothing in it can prevent. Replacing the file, as `save_experts` does, is safe: the
old one lives on for those who have it mapped."""

VERSION = 1
_MAGIC = b"QSEXPERT"
_HEAD = struct.Struct("<8sIIQQ")
_HEAD_BYTES = 64
_PAGE = 4096
_CHUNK = 1 << 24


class ExpertsWriter:
    """Writes layer after layer; the file appears when the block ends without an error.

    One layer is in memory at a time:

        with ExpertsWriter(path) as writer:
            for name, experts in layers:
                writer.add(name, experts)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._replacing = replacing(path)
        self._file: BinaryIO | None = None
        self._index: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._file = self._replacing.__enter__()
        self._file.write(bytes(_PAGE))
        return self

    def add(self, name: str, experts: Experts) -> None:
        """Writes a layer.

        Raises:
            ValueError: a name that is empty or was given before.
            TypeError: something else than a name and experts.
        """
        if self._file is None:
            raise ValueError("writer: got a call outside of its with block, expected one inside")
        if not isinstance(name, str):
            raise TypeError(f"name: got {type(name).__name__}, expected a string")
        if not name or name in self._index:
            raise ValueError(f"name: got {name!r}, expected one that is new and not empty")
        if not isinstance(experts, Experts):
            raise TypeError(f"experts: got {type(experts).__name__}, expected Experts")
        offset = self._file.tell()
        self._file.write(experts.data.data)
        self._file.write(bytes(-self._file.tell() % _PAGE))
        self._index[name] = {
            "offset": offset,
            "crc32": _crc32(experts.data),
            "shape": experts.shape.to_dict(),
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file = self._file
        assert file is not None
        self._file = None
        if kind is not None:
            self._replacing.__exit__(kind, error, trace)
            return
        with ExitStack() as stack:
            stack.push(self._replacing)
            index = json.dumps({"layers": self._index}).encode()
            offset = file.tell()
            file.write(index)
            file.seek(0)
            file.write(_HEAD.pack(_MAGIC, VERSION, zlib.crc32(index), offset, len(index)))


def save_experts(path: str | os.PathLike[str], layers: Mapping[str, Experts]) -> None:
    """Writes the experts of layers by name; a file that is there stays whole until replaced.

    Raises:
        TypeError, ValueError: as `ExpertsWriter.add`.
    """
    with ExpertsWriter(path) as writer:
        for name, experts in layers.items():
            writer.add(name, experts)


def load_experts(
    path: str | os.PathLike[str], *, memory: Memory = "huge", verify: bool = True
) -> dict[str, Experts]:
    """The layers that `save_experts` wrote, by name.

    Args:
        path: of the file.
        memory: where the weights are to be.
        verify: whether the checksums of the weights are compared, for which all of the file is
            read. Its size and its index are checked in any case.

    Raises:
        ValueError: the file is no such file, of another version, cut short or damaged; the message
            names the path.
        OSError: it cannot be read.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory: got {memory!r}, expected one of {get_args(Memory)}")
    name = os.fspath(path)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        index = _read_index(file, size, name)
        mapped = guard = None
        if memory == "map":
            guard = _Guard(file.fileno(), name)
            mapped = np.frombuffer(
                mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8
            )
        layers = {}
        for layer, (shape, offset, crc) in index.items():
            if mapped is not None:
                data = mapped[offset : offset + shape.nbytes]
            else:
                data = allocate_bytes(shape.nbytes, huge_pages=memory == "huge")
                file.seek(offset)
                if file.readinto(data.data) != shape.nbytes:
                    raise ValueError(f"{name}: {layer!r} is cut short")
            if verify and _crc32(data) != crc:
                raise ValueError(f"{name}: {layer!r} is damaged, its checksum is another")
            layers[layer] = Experts(shape, data)
            layers[layer].guard = guard
    return layers


class _Guard:
    """Tells a mapped file that has changed since it was opened."""

    def __init__(self, file: int, name: str) -> None:
        self._file, self._name = os.dup(file), name
        self._was = self._state()

    def __call__(self) -> None:
        now = self._state()
        if now != self._was:
            raise OSError(
                f"{self._name}: got {now[0]} bytes, written to after it was mapped, expected "
                f"{self._was[0]} as they were"
            )

    def _state(self) -> tuple[int, int]:
        about = os.fstat(self._file)
        return about.st_size, about.st_mtime_ns

    def __del__(self) -> None:
        os.close(self._file)


def _read_index(file: BinaryIO, size: int, path: str) -> dict[str, tuple[ExpertsShape, int, int]]:
    head = file.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES or head[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path}: got no file of packed experts, or one that was never finished")
    _, version, crc, offset, length = _HEAD.unpack(head[: _HEAD.size])
    if version != VERSION:
        raise ValueError(f"{path}: version: got {version}, expected {VERSION}")
    if offset + length != size:
        raise ValueError(f"{path}: got {size} bytes, expected {offset + length}")
    file.seek(offset)
    content = file.read(length)
    if zlib.crc32(content) != crc:
        raise ValueError(f"{path}: the index is damaged, its checksum is another")
    found: dict[str, tuple[ExpertsShape, int, int]] = {}
    end = _PAGE
    try:
        for name, entry in json.loads(content)["layers"].items():
            shape = ExpertsShape(**entry["shape"])
            start, check = entry["offset"], entry["crc32"]
            for field, value in (("offset", start), ("crc32", check)):
                if type(value) is not int:
                    raise ValueError(f"{field}: got {value!r}, expected a whole number")
            if start % _PAGE or start < end or start + shape.nbytes > offset:
                raise ValueError(f"offset: got {start}, expected room between {end} and {offset}")
            end = start + shape.nbytes
            found[name] = (shape, start, check)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: index: {error}") from None
    return found


def _crc32(data: NDArray[np.uint8]) -> int:
    crc = 0
    for start in range(0, len(data), _CHUNK):
        crc = zlib.crc32(data[start : start + _CHUNK].data, crc)
    return crc
