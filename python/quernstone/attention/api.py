"""The public attention call."""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quernstone.attention import torch_op
from quernstone.attention.types import Aux, Kind

_KINDS = frozenset(get_args(Kind))


@overload
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind = ...,
    sinks: Tensor | None = ...,
    gate: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    key_start: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    token_mask: Tensor | None = ...,
    return_aux: Literal[False] = ...,
) -> Tensor: ...


@overload
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind = ...,
    sinks: Tensor | None = ...,
    gate: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    scale: float | None = ...,
    key_start: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    token_mask: Tensor | None = ...,
    return_aux: Literal[True],
) -> tuple[Tensor, Aux]: ...


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind = "sink",
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, Aux]:
    """Scaled dot-product attention with a sink, or with a gate on its output.

    Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width
    (16 to 256). Query i stands at position i + s - t, so that the last query sees the last key,
    as with a key-value cache.

    Args:
        q: [b, h, t, d] fp32 or bf16, on a CUDA device also fp16; any strides. Sums are fp32 always.
        k, v: [b, g, s, d], dtype of q.
        kind: what becomes of plain attention A over the visible keys, L being their log-sum-exp.
            "sink": sigmoid(L - sinks[h]) A, as if one more key had the logit sinks[h] and no
            value. "gated": sigmoid(gate) A. "vanilla": A; its gate is the weight of all keys
            but the first.
        sinks: [h] fp32 or dtype of q, nats; for kind "sink", and no other.
        gate: [b, h, t] or [b, h, t, d] logits, dtype of q; for kind "gated", and no other.
        causal: hide the keys behind a query's position.
        window: show a query at position p the keys above p - window (and, unless causal,
            below p + window). None: all.
        scale: factor on q . k; None: d ** -0.5.
        key_start: [b] int, first visible key: left padding.
        key_lengths: [b] int, end of the visible keys: right padding. A CUDA device does not wait to
            look at either: there, values outside 0 to s count as 0 or s.
        token_mask: [b, t] bool, the tokens that count for the importance; None: all. A token
            that sees no key (kind "vanilla": none beside the first) never counts.
        return_aux: give the log-sum-exp and the importance too.

    Returns:
        [b, h, t, d] in the dtype of q, contiguous. A query that sees no key gives 0. With
        ``return_aux`` also `Aux`: ``lse`` [b, h, t] fp32 in nats over the visible keys, the sink
        left out, -inf where there is none; ``importance`` [h] fp32, the mean gate over the
        tokens that count, 0 where none does. The first key of kind "vanilla" is the one at
        ``key_start``; a query whose window has left it behind has gate 1.

    Raises:
        ValueError: an argument that is missing, superfluous, out of range, or of another rank,
            shape, dtype or device than it should be. The message names the argument, what came
            and what was expected.
        TypeError: an argument of the wrong Python type.

    Source: "Attention Sink Forges Native MoE in Attention Layers", arXiv 2602.01203: gates and
    importance of section 3; oracle `quernstone.attention.reference.sink_attention`.
    """
    if causal is not True and causal is not False:
        raise TypeError(f"causal: got {type(causal).__name__}, expected bool")
    if kind not in _KINDS:
        _refuse_kind(kind)
    if window is not None and type(window) is not int:
        window = _integer("window", window)
    if isinstance(scale, Tensor):
        # torch would take its number, and with it silently its gradient.
        raise TypeError(f"scale: got {type(scale).__name__}, expected float or None")
    if forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v, sinks, gate)
    try:
        if torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (sinks is not None and sinks.requires_grad)
            or (gate is not None and gate.requires_grad)
        ):
            if token_mask is not None and not return_aux:
                raise ValueError(
                    "token_mask: got a tensor, expected None unless return_aux is true"
                )
            padding = (key_start, key_lengths)
            out, lse, importance, _ = torch_op.sink_attention_training(
                q, k, v, kind, sinks, gate, causal, window, scale, *padding, token_mask
            )
            return (out, Aux(lse, importance)) if return_aux else out
        # By position: torch parses keywords more slowly than a short kernel runs.
        if return_aux:
            padding = (key_start, key_lengths)
            out, lse, importance = torch_op.sink_attention_aux(
                q, k, v, kind, sinks, gate, causal, window, scale, *padding, token_mask
            )
            return out, Aux(lse, importance)
        if token_mask is not None:
            raise ValueError("token_mask: got a tensor, expected None unless return_aux is true")
        plain: Tensor = torch_op.sink_attention(
            q, k, v, kind, sinks, gate, causal, window, scale, key_start, key_lengths
        )
        return plain
    except (RuntimeError, AttributeError):
        # torch's dispatcher refuses wrong types and devices in its own words.
        _explain(locals())
        raise


def _refuse_kind(kind: object) -> None:
    if not isinstance(kind, str):
        raise TypeError(f"kind: got {type(kind).__name__} {kind!r}, expected str")
    if kind not in _KINDS:
        raise ValueError(f"kind: got {ascii(kind)[1:-1]}, expected 'sink', 'vanilla' or 'gated'")


def _integer(name: str, x: Any) -> Any:
    """An int, a NumPy integer or a torch.SymInt; torch would also take bools and cut fractions."""
    if isinstance(x, bool | Tensor) or not hasattr(x, "__index__"):
        raise TypeError(f"{name}: got {type(x).__name__} {x!r}, expected int or None")
    return x if isinstance(x, torch.SymInt) else x.__index__()


def _refuse_tangents(*tensors: Tensor | None) -> None:
    for name, x in zip(("q", "k", "v", "sinks", "gate"), tensors, strict=True):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name}: got a tensor with a tangent, expected one without: "
                "there are no forward-mode gradients"
            )


def _explain(arguments: dict[str, object]) -> None:
    """Raise what a caller can act on for the argument that torch's dispatcher refused."""
    q = arguments["q"]
    for name in ("q", "k", "v", "sinks", "gate", "key_start", "key_lengths", "token_mask"):
        x = arguments[name]
        optional = name not in ("q", "k", "v")
        if x is None and optional:
            continue
        if not isinstance(x, Tensor):
            wanted = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name}: got {type(x).__name__}, expected {wanted}")
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}.device: got {x.device}, expected cpu or cuda")
        if isinstance(q, Tensor) and x.device != q.device:
            raise ValueError(f"{name}.device: got {x.device}, expected {q.device}")
        if x.layout != torch.strided or x.is_nested:
            layout = "a nested tensor" if x.is_nested else x.layout
            raise ValueError(f"{name}.layout: got {layout}, expected torch.strided")
        if x.is_quantized:
            raise ValueError(f"{name}.dtype: got {x.dtype}, expected one that is not quantised")
    window, scale = arguments["window"], arguments["scale"]
    if isinstance(window, int) and not 1 <= window < 2**63:
        raise ValueError(f"window: got {window}, expected at least 1 and below 2^63")
    if scale is not None:
        if not isinstance(scale, int | float):
            raise TypeError(f"scale: got {type(scale).__name__} {scale!r}, expected float or None")
        try:
            float(scale)
        except OverflowError:
            raise ValueError("scale: got a number beyond fp64, expected a finite number") from None
