"""Reading an ONNX file as a graph.

Source: the ONNX operator specification, opsets 7 to 28. Oracle: onnxruntime.
"""

from __future__ import annotations

import os
from pathlib import Path

from quernstone.importers.folding import fold_constants
from quernstone.importers.fuse import fuse as fuse_graph
from quernstone.importers.graph import Graph, Node, check_weights
from quernstone.importers.onnx_file import Model, load
from quernstone.importers.onnx_operators import TRANSLATE
from quernstone.importers.onnx_translation import Translation, Unsupported


def read_onnx(path: str | os.PathLike[str], *, fuse: bool = True) -> Graph:
    """Reads an ONNX file as a graph of fp32 layers.

    Batch normalisation becomes part of the convolution or linear layer before it, or a product and
    a sum where there is none; weights of half precision become fp32.

    Args:
        path: the file; external data must lie in its folder.
        fuse: whether scales and shifts are folded into layers, and the patterns of activations,
            layer norm and attention become one node each.

    Returns:
        The graph. Names of tensors and nodes are the file's, where it has them.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package onnx is missing.
        ValueError: no whole ONNX file, external data outside its folder, weights that are not
            finite or whose shapes disagree, nodes in a circle; or operators that are not supported,
            with all their nodes.
    """
    model = load(Path(path))
    try:
        graph = _translated(model)
        return fuse_graph(graph, model.ranks) if fuse else graph
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _translated(model: Model) -> Graph:
    translation = Translation(model)
    refused: list[str] = []
    for node in model.nodes:
        translate = TRANSLATE.get(node.op) if node.domain in ("", "ai.onnx") else None
        op = node.op if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op}"
        if translate is None:
            refused.append(f"{op} ({node.name!r})")
            continue
        try:
            translate(translation, node)
        except Unsupported as error:
            refused.append(f"{op} ({node.name!r}: {error})")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{op} {node.name!r}: malformed, {error!r}") from error
    if refused:
        raise Unsupported(f"not supported: {', '.join(refused)}")
    nodes = [
        Node(n.name, n.op, tuple(map(translation.source, n.inputs)), n.outputs, n.attributes)
        for n in translation.nodes
    ]
    outputs = tuple(translation.source(name) for name in model.outputs)
    graph = Graph(tuple(nodes), model.inputs, outputs, translation.constants, model.metadata)
    return check_weights(fold_constants(graph).without_dead_ends())
