"""The operators ``quernstone::sink_attention``, ``..._aux``, ``..._training`` and ``..._backward``.

The extension defines them and their CPU kernels. Here torch learns where their CUDA kernels are,
their shapes, for ``torch.compile``, ``torch.export`` and fake tensors, and the gradient of the
training operator. The extents are checked by the kernel, which sees the real ones.

Gradients have an operator of their own: the others stay free of autograd's Python, which costs
more than a short call.
"""

from collections.abc import Callable
from typing import Any, NoReturn

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


def _sink_attention_fake(*call: Any) -> Tensor:
    return _sink_attention_aux_fake(*call)[0]


def _sink_attention_training_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "sink",
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, t, _ = q.shape
    saved = (b if kind == "vanilla" else 0, h, t)
    return (
        *_sink_attention_aux_fake(q, k, v, kind, *others),
        q.new_empty(saved, dtype=torch.float32),
    )


def _sink_attention_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    dimportance: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gate_logit: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    sinks: Tensor | None,
    gate: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    key_start: Tensor | None,
    key_lengths: Tensor | None,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=q.dtype, device=q.device),
        torch.empty(v.shape, dtype=q.dtype, device=q.device),
        q.new_empty(q.shape[1] if kind == "sink" else 0, dtype=torch.float32),
        torch.empty((0,) if gate is None else gate.shape, dtype=q.dtype, device=q.device),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kind, sinks, gate, causal, window, scale, *masks = inputs
    out, lse, _, gate_logit = output
    ctx.options = (kind, causal, window, scale)
    ctx.save_for_backward(q, k, v, sinks, gate, *masks, out, lse, gate_logit)
    ctx.mark_non_differentiable(gate_logit)
    ctx.set_materialize_grads(False)


def _sink_attention_training_backward(
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
    dimportance: Tensor | None,
    _gate_logit: None,
) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, gate, key_start, key_lengths, token_mask, out, lse, gate_logit = (
        ctx.saved_tensors
    )
    kind, causal, window, scale = ctx.options
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    dq, dk, dv, dsinks, dgate = sink_attention_backward(
        *(dout, dlse, dimportance, out, lse, gate_logit if kind == "vanilla" else None),
        *(q, k, v, kind, sinks, gate, causal, window, scale),
        *(key_start, key_lengths, token_mask),
    )
    return (
        *(dq, dk, dv, None),
        None if sinks is None else dsinks.to(sinks.dtype),
        None if gate is None else dgate,
        *(None,) * 6,
    )


def _no_second_gradient(ctx: Any, *_: Tensor) -> NoReturn:
    raise NotImplementedError(
        "sink_attention: the gradient of its gradient is not implemented; "
        "call backward() or grad() without create_graph=True"
    )


def _on_cuda(name: str) -> Callable[..., Any]:
    """The CUDA kernel of an operator, imported when it first runs: Triton takes a second."""

    def kernel(*arguments: Any) -> Any:
        from quernstone.attention import cuda_op

        return getattr(cuda_op, name)(*arguments)

    return kernel


_OPERATORS = (
    "sink_attention",
    "sink_attention_aux",
    "sink_attention_training",
    "sink_attention_backward",
)
_cuda_kernels = torch.library.Library("quernstone", "IMPL")
for _name in _OPERATORS:
    _cuda_kernels.impl(_name, _on_cuda(_name), "CUDA")

torch.library.register_fake("quernstone::sink_attention", _sink_attention_fake)
torch.library.register_fake("quernstone::sink_attention_aux", _sink_attention_aux_fake)
torch.library.register_fake("quernstone::sink_attention_training", _sink_attention_training_fake)
torch.library.register_fake("quernstone::sink_attention_backward", _sink_attention_backward_fake)
torch.library.register_autograd(
    "quernstone::sink_attention_training",
    _sink_attention_training_backward,
    setup_context=_save,
)
torch.library.register_autograd("quernstone::sink_attention_backward", _no_second_gradient)

sink_attention = torch.ops.quernstone.sink_attention.default
sink_attention_aux = torch.ops.quernstone.sink_attention_aux.default
sink_attention_training = torch.ops.quernstone.sink_attention_training.default
sink_attention_backward = torch.ops.quernstone.sink_attention_backward.default
