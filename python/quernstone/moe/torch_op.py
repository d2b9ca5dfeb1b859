"""Operators of experts, without Python between a model and the kernel.

``quernstone::moe_experts`` computes a layer on the CPU, ``quernstone::moe_step`` one of a runtime
on an emulated device. The extension defines both and their CPU kernels. Here torch learns their
shapes, for ``torch.compile``, ``torch.export`` and fake tensors. They have no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quernstone import _config  # noqa: F401  (defines the operator)
from quernstone.moe.experts import Experts

_STEP = torch.ops.quernstone.moe_step.default
_FORMATS = {"bf16": 0, "int8": 1, "int4": 2}
_COMPUTES = {"float": 0, "int8": 1, "mixed": 2}


def _fake(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("quernstone::moe_experts", _fake)
torch.library.register_fake("quernstone::moe_step", _fake)


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
    return packed, torch.tensor(settings, dtype=torch.int64, device="cpu")


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


def step_of_runtime(
    x: Tensor, ids: Tensor, weights: Tensor, scores: Tensor | None, number: int
) -> Tensor:
    """A layer of a runtime, by the number of its `_core.moe.Step`."""
    if x.requires_grad or weights.requires_grad or (scores is not None and scores.requires_grad):
        x, weights = x.detach(), weights.detach()
        scores = None if scores is None else scores.detach()
    found: Tensor = _STEP(x, ids, weights, scores, number)
    return found
