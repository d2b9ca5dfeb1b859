"""Reading a GGUF file: its metadata, and its tensors as fp32.

Source: the GGUF specification in ggml's repository (docs/gguf.md), version 3; block layouts of
ggml-common.h. Oracle: the package gguf.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _LIST = 8, 9


@dataclass(frozen=True)
class Gguf:
    """The content of a GGUF file."""

    metadata: dict[str, Any]
    """Numbers, strings and lists of them by their names in the file."""
    tensors: dict[str, NDArray[np.float32]]
    """Weights by their names in the file; a matrix is [out, in], as in torch."""


def read_gguf(path: Path) -> Gguf:
    """Read a GGUF file of version 3 whose tensors are F32, F16, Q4_1 or Q8_0.

    Raises:
        ValueError: another file, version or tensor type, or a file that is cut off; the message
            names it.
    """
    content = path.read_bytes()
    if content[:4] != b"GGUF":
        raise ValueError(f"{path}: got a file that begins with {content[:4]!r}, expected b'GGUF'")
    try:
        return _parse(path, content)
    except (struct.error, OverflowError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None


def _parse(path: Path, content: bytes) -> Gguf:
    header = _Cursor(content, 4)
    version = header.take("I")
    if version != 3:
        raise ValueError(f"{path}: got GGUF version {version}, expected 3")
    count, entries = header.take("Q"), header.take("Q")
    metadata = {}
    for _ in range(entries):
        # In this order: the name comes first in the file.
        name = header.string()
        metadata[name] = header.value(header.take("I"))
    infos = [header.info() for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    begin = -(-header.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        if kind not in _LAYOUTS:
            raise ValueError(f"{path}: tensor {name} is of type {kind}, expected {list(_LAYOUTS)}")
        layout, unpack, per_block = _LAYOUTS[kind]
        blocks = math.prod(shape) // per_block
        if begin + offset + blocks * layout.itemsize > len(content):
            raise ValueError(f"{path}: not a whole GGUF file (tensor {name} is cut off)")
        raw = np.frombuffer(content, layout, blocks, begin + offset)
        tensors[name] = unpack(raw).reshape(shape)
    return Gguf(metadata, tensors)


class _Cursor:
    """Reads one little-endian value after the other."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return str(self.content[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _LIST:
            inner, length = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(length)]
        return self.take(_SCALARS[kind])

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor; GGUF writes the fastest axis first."""
        name, rank = self.string(), self.take("I")
        shape = tuple(self.take("Q") for _ in range(rank))[::-1]
        return name, shape, self.take("I"), self.take("Q")


def _q4_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    # 32 weights d q + m; the low halves of the bytes are the first 16 of them.
    low_high = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
    scaled = low_high.astype(np.float32) * blocks["d"].astype(np.float32)[:, None]
    return scaled + blocks["m"].astype(np.float32)[:, None]


def _q8_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks["q"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None]


def _plain(numbers: NDArray[Any]) -> NDArray[np.float32]:
    return numbers.astype(np.float32)


# By ggml's number of the type: layout of a block, how to unpack it, weights in a block.
_LAYOUTS: dict[int, tuple[Any, Any, int]] = {
    0: (np.dtype("<f4"), _plain, 1),
    1: (np.dtype("<f2"), _plain, 1),
    3: (np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), _q4_1, 32),
    8: (np.dtype([("d", "<f2"), ("q", "i1", 32)]), _q8_0, 32),
}
