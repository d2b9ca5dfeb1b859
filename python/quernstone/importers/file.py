"""A graph as a safetensors file: the constants as tensors, the nodes in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quernstone._files import write_whole
from quernstone.importers.graph import Array, Graph, Node, Value, check_weights

# In the metadata of the file: {"quernstone.graph": "<version>", "quernstone.nodes": JSON}.
VERSION = 1
_VERSION_KEY, _NODES_KEY = "quernstone.graph", "quernstone.nodes"


def write_safetensors(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Writes a graph as a safetensors file, which replaces what the path held in one step.

    Weights have the names and layouts that they have in the graph: of a graph that came from a
    state dict, those of the state dict.
    """
    from safetensors.numpy import save

    about = {
        "nodes": [
            [n.name, n.op, list(n.inputs), list(n.outputs), dict(n.attributes)] for n in graph.nodes
        ],
        "inputs": [list(value) for value in graph.inputs],
        "outputs": list(graph.outputs),
        "metadata": dict(graph.metadata),
        "shapes": {name: list(shape) for name, shape in graph.shapes.items()},
    }
    # Infinity is what Clip has for a bound that is absent, and JSON does not.
    text = json.dumps(about, allow_nan=True)
    metadata = {_VERSION_KEY: str(VERSION), _NODES_KEY: text}
    arrays = {name: np.asarray(array, order="C") for name, array in graph.constants.items()}
    write_whole(path, save(arrays, metadata))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a safetensors file as numpy arrays, bf16 and fp16 as fp32, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no whole safetensors file.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    arrays = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    tensor = tensor.float()
                arrays[name] = tensor.numpy()
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return arrays, metadata


def stored_graph(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Graph | None:
    """The graph that `write_safetensors` wrote; None for a file that is a plain state dict.

    Raises:
        ValueError: another version, or nodes that make no graph of these tensors.
    """
    if _NODES_KEY not in metadata:
        return None
    if metadata.get(_VERSION_KEY) != str(VERSION):
        got = metadata.get(_VERSION_KEY)
        raise ValueError(f"{_VERSION_KEY}: got {got!r}, expected '{VERSION}'")
    try:
        about = json.loads(metadata[_NODES_KEY])
        graph = Graph(
            tuple(
                Node(name, op, tuple(inputs), tuple(outputs), _tuples(attributes))
                for name, op, inputs, outputs, attributes in about["nodes"]
            ),
            tuple(
                Value(name, dtype, None if shape is None else tuple(shape))
                for name, dtype, shape in about["inputs"]
            ),
            tuple(about["outputs"]),
            arrays,
            about["metadata"],
            {name: tuple(shape) for name, shape in about["shapes"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_NODES_KEY}: {error}") from None
    return check_weights(graph)


def _tuples(value: Any) -> Any:
    """JSON has lists where attributes are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
