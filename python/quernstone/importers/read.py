"""One entrance for every file format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quernstone.importers.architectures import from_state_dict
from quernstone.importers.file import read_tensors, stored_graph
from quernstone.importers.gguf_file import read_gguf
from quernstone.importers.graph import Graph
from quernstone.importers.llama_gguf import llama_config, llama_weights
from quernstone.importers.onnx_reader import read_onnx


def read(path: str | os.PathLike[str]) -> Graph:
    """Reads a model as a graph: .onnx, .safetensors, .gguf, or a folder with model.safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a package that reads this format is missing.
        ValueError: a file of another kind, or that cannot be read; the message names the path.
    """
    path = Path(path)
    if path.is_dir():
        return read_safetensors(path / "model.safetensors")
    readers: dict[str, Callable[[Path], Graph]] = {
        ".onnx": read_onnx,
        ".safetensors": read_safetensors,
        ".gguf": read_llama_gguf,
    }
    if path.suffix not in readers:
        expected = ", ".join(readers)
        raise ValueError(f"{path}: got a file ending in {path.suffix!r}, expected {expected}")
    return readers[path.suffix](path)


def read_safetensors(path: str | os.PathLike[str], config: dict[str, Any] | None = None) -> Graph:
    """Reads a graph that `Graph.save` wrote, or the state dict of a BERT or Llama model.

    Args:
        path: the file.
        config: of a state dict, what transformers has in config.json; None reads that file, beside
            the other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no whole file, no config, or what `from_state_dict` refuses.
    """
    path = Path(path)
    arrays, metadata = read_tensors(path)
    try:
        graph = stored_graph(arrays, metadata)
        if graph is not None:
            return graph
        return from_state_dict(arrays, _config(path) if config is None else config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_llama_gguf(path: str | os.PathLike[str]) -> Graph:
    """Reads a Llama model from a GGUF file, its quantised weights as fp32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another file, architecture or tensor type; the message names it.
    """
    path = Path(path)
    file = read_gguf(path)
    try:
        config = llama_config(file)
        return from_state_dict(llama_weights(file), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(path: Path) -> dict[str, Any]:
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise ValueError("weights alone, with no config.json beside them")
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("config.json: got no object")
    return config
