"""Quantised tensors in a safetensors file, with a version and everything checked on the way in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quernstone._files import write_whole
from quernstone.quant.scheme import Scheme
from quernstone.quant.tensor import QTensor

# In the metadata of the file: {"quernstone.quant": "<version>", "quernstone.tensors": JSON}.
VERSION = 1
_VERSION_KEY, _TENSORS_KEY = "quernstone.quant", "quernstone.tensors"
_PARTS = ("packed", "scales", "zero_points")


def save(tensors: Mapping[str, QTensor], path: str | os.PathLike[str]) -> None:
    """Writes quantised tensors as a safetensors file: `<name>.packed`, `.scales`, `.zero_points`.

    A file that is already there is replaced in one step, or left as it is where writing fails.

    Raises:
        TypeError: a value is not a QTensor, or a name no string.
    """
    from safetensors.torch import save as to_bytes

    parts: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: got the name {name!r}, expected a string")
        if not isinstance(tensor, QTensor):
            raise TypeError(f"tensors[{name!r}]: got {type(tensor).__name__}, expected a QTensor")
        index[name] = {"scheme": tensor.scheme.to_dict(), "shape": list(tensor.shape)}
        for part in _PARTS:
            value = getattr(tensor, part)
            if value is not None:
                # A copy: safetensors refuses tensors that share their memory.
                parts[f"{name}.{part}"] = value.clone(memory_format=torch.contiguous_format)
    metadata = {_VERSION_KEY: str(VERSION), _TENSORS_KEY: json.dumps(index)}
    write_whole(path, to_bytes(parts, metadata))


def load(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another version, or a part is missing, superfluous
            or unlike what its scheme implies; the message names the path.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    version = metadata.get(_VERSION_KEY)
    if version != str(VERSION):
        raise ValueError(f"{path}: {_VERSION_KEY}: got {version!r}, expected '{VERSION}'")
    try:
        tensors = _assemble(json.loads(metadata[_TENSORS_KEY]), parts)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if parts:
        raise ValueError(f"{path}: got {sorted(parts)} beside the tensors, expected nothing")
    return tensors


def _assemble(index: Any, parts: dict[str, Tensor]) -> dict[str, QTensor]:
    tensors = {}
    for name, about in index.items():
        shape = tuple(about["shape"])
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
            raise ValueError(f"{name}.shape: got {shape}, expected whole numbers")
        for part in ("packed", "scales"):
            if f"{name}.{part}" not in parts:
                raise ValueError(f"{name}.{part}: got nothing, expected a tensor")
        packed, scales = parts.pop(f"{name}.packed"), parts.pop(f"{name}.scales")
        zero_points = parts.pop(f"{name}.zero_points", None)
        try:
            scheme = Scheme.from_dict(about["scheme"])
            tensors[name] = QTensor(scheme, shape, packed, scales, zero_points)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}.{error}") from None
    return tensors
