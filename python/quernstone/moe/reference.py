"""Experts in plain torch, fp64: what the fused ones are compared with.

Axes: t tokens, c choices of a token, m hidden width, f feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor]
"""Gate and up [f, m], down [m, f]."""


def experts(matrices: Sequence[Matrices], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum over c of weights[t, c] down(silu(gate(x[t])) * up(x[t])), [t, m] fp64.

    Args:
        matrices: of each expert.
        x: [t, m].
        ids: [t, c], -1 for none.
        weights: [t, c].

    Source: Mixtral, arXiv 2401.04088, section 2.1. Oracle: the block of transformers.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for c in range(ids.shape[1]):
            if ids[t, c] < 0:
                continue
            gate, up, down = (matrix.double() for matrix in matrices[int(ids[t, c])])
            token = x[t].double()
            inner = torch.nn.functional.silu(gate @ token) * (up @ token)
            out[t] += weights[t, c].double() * (down @ inner)
    return out


def rounded_to_int8(x: Tensor, group: int = 32) -> Tensor:
    """[t, k] fp64: activations as products with int8 see them, groups of 32, the largest at 127."""
    tokens, inputs = x.shape
    wide = torch.nn.functional.pad(x.double(), (0, -inputs % group))
    groups = wide.view(tokens, -1, group)
    top = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(top == 0, 1.0, top / 127)
    return ((groups / scale).round() * scale).view(tokens, -1)[:, :inputs]
