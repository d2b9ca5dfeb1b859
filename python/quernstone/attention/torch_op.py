"""The operators ``quernstone::sink_attention`` and ``quernstone::sink_attention_aux``.

The extension defines both and their CPU kernels. Here torch learns their shapes, for
``torch.compile``, ``torch.export`` and fake tensors. The extents are checked by the kernel,
which sees the real ones.
"""

import torch
from torch import Tensor

from quernstone import _config  # noqa: F401  (defines the operators)


def _out(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> Tensor:
    torch._check_value(
        q.ndim == 4 and k.ndim == 4 and v.ndim == 4,
        lambda: f"q, k, v: got {q.ndim}, {k.ndim} and {v.ndim} axes, expected 4 each",
    )
    for name, x in (("k", k), ("v", v), *others.items()):
        if x is not None:
            torch._check_value(
                x.device == q.device,
                lambda name=name, x=x: f"{name}.device: got {x.device}, expected {q.device}",
            )
    for name, x in (("k", k), ("v", v)):
        torch._check_value(
            x.dtype == q.dtype,
            lambda name=name, x=x: f"{name}.dtype: got {x.dtype}, expected {q.dtype}",
        )
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _sink_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "sink",
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    return _out(q, k, v, sinks=sinks, gate=gate, key_start=key_start, key_lengths=key_lengths)


def _sink_attention_aux_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "sink",
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _out(
        q,
        k,
        v,
        sinks=sinks,
        gate=gate,
        key_start=key_start,
        key_lengths=key_lengths,
        token_mask=token_mask,
    )
    return (
        out,
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(q.shape[1:2], dtype=torch.float32),
    )


torch.library.register_fake("quernstone::sink_attention", _sink_attention_fake)
torch.library.register_fake("quernstone::sink_attention_aux", _sink_attention_aux_fake)

sink_attention = torch.ops.quernstone.sink_attention.default
sink_attention_aux = torch.ops.quernstone.sink_attention_aux.default
