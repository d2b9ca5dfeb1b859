"""The operator ``quernstone::moe_experts``: experts without Python between a model and the kernel.

The extension defines it and its CPU kernel. Here torch learns its shape, for ``torch.compile``,
``torch.export`` and fake tensors. It has no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quernstone import _config  # noqa: F401  (defines the operator)
from quernstone.moe.experts import Experts

_FORMATS = {"bf16": 0, "int8": 1, "int4": 2}
_COMPUTES = {"float": 0, "int8": 1, "mixed": 2}


def _fake(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("quernstone::moe_experts", _fake)


def operands(experts: Experts) -> tuple[Tensor, Tensor]:
    """The operator's last two: the bytes of the experts, which it shares, and their settings."""
    shape = experts.shape
    with warnings.catch_warnings():
        # A mapped file cannot be written, and the kernel does not.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        packed = torch.from_numpy(experts.data)
    settings = (
        _FORMATS[shape.format],
        shape.hidden,
        shape.intermediate,
        shape.group,
        shape.zero_points,
        _COMPUTES[experts.compute],
    )
    return packed, torch.tensor(settings, dtype=torch.int64)


def bind_experts(experts: Experts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of x, ids and weights that computes these experts as they compute themselves."""
    packed, settings = operands(experts)
    operator = torch.ops.quernstone.moe_experts.default

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if x.requires_grad or weights.requires_grad:
            x, weights = x.detach(), weights.detach()
        found: Tensor = operator(x, ids, weights, packed, settings)
        return found

    return call
