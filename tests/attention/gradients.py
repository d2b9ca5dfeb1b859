"""Gradients of one call, ours and the reference's, under incoming gradients drawn at random."""

from typing import Any

import torch
from torch import Tensor

from quernstone.attention import Aux, reference, sink_attention

from .cases import Case, split
from .tolerances import relative_error

# Of the inputs that a gradient belongs to, whatever the kind.
NAMES = ("q", "k", "v", "sinks", "gate")


class Incoming:
    """Weights w of the scalar sum(w . result), which is what we differentiate."""

    def __init__(
        self,
        out: Tensor,
        aux: Aux | None,
        seed: int = 1,
        importance: float = 10.0,
        lse: bool = True,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.out = torch.randn(out.shape, generator=rng)
        self.lse = torch.randn(out.shape[:3], generator=rng)
        # Importance is a mean over tokens: its gradient would vanish beside the others.
        self.importance = importance * torch.randn(out.shape[1], generator=rng)
        self.with_lse = lse

    def total(self, out: Tensor, aux: Aux | None) -> Tensor:
        total = (out * self.out.to(out.dtype)).sum()
        if aux is not None and self.with_lse:
            total = total + (aux.lse.nan_to_num(neginf=0.0) * self.lse.to(aux.lse.dtype)).sum()
        if aux is not None:
            total = total + (aux.importance * self.importance.to(aux.importance.dtype)).sum()
        return total


def ours(
    tensors: tuple[Tensor, ...], options: dict[str, Any], **changes: Any
) -> tuple[dict[str, Tensor], Incoming]:
    """Gradient by name of every input that has one."""
    leaves = _leaves(tensors, options, None)
    out, aux = split(
        sink_attention(leaves["q"], leaves["k"], leaves["v"], **options | _rest(leaves))
    )
    incoming = Incoming(out, aux, **changes)
    return _gradients(incoming.total(out, aux), leaves), incoming


def references(
    tensors: tuple[Tensor, ...], options: dict[str, Any], incoming: Incoming
) -> dict[str, Tensor]:
    leaves = _leaves(tensors, options, torch.float64)
    out, aux = split(
        reference.sink_attention(leaves["q"], leaves["k"], leaves["v"], **options | _rest(leaves))
    )
    return _gradients(incoming.total(out, aux), leaves)


def errors(case: Case, seed: int = 0, **changes: Any) -> dict[str, float]:
    """Relative error of each gradient of a case."""
    tensors, options = case.make(seed)
    return call_errors(tensors, options, **changes)


def call_errors(
    tensors: tuple[Tensor, ...], options: dict[str, Any], **changes: Any
) -> dict[str, float]:
    got, incoming = ours(tensors, options, **changes)
    want = references(tensors, options, incoming)
    for name, gradient in got.items():
        leaf = dict(zip("qkv", tensors, strict=True)) | options
        assert (gradient.shape, gradient.dtype) == (leaf[name].shape, leaf[name].dtype), name
    return {name: relative_error(got[name], want[name]) for name in want}


def _leaves(
    tensors: tuple[Tensor, ...], options: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    found = dict(zip("qkv", tensors, strict=True)) | options
    return {
        name: found[name].detach().clone().to(dtype or found[name].dtype).requires_grad_()
        for name in NAMES
        if found.get(name) is not None
    }


def _rest(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))
