"""`attn_implementation="quernstone"` for the models of transformers.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quernstone.attention.api import sink_attention
from quernstone.attention.autocast import autocast
from quernstone.attention.hf_mask import KeyMask, key_mask, refuse

NAME = "quernstone"
"""The name to load a model with."""

PROBE = "_quernstone_probe"
"""Attribute under which a module may hold a callable that takes the place of `sink_attention`."""

# What transformers passes to an attention function and what changes its result in a way that
# sink_attention has no argument for. The rest of the keywords says nothing about the scores.
_UNSUPPORTED = {
    "softcap": "soft-capping of the scores (softcap)",
    "position_bias": "a position bias (position_bias)",
    "attention_bias": "an attention bias (attention_bias)",
    "score_mod": "a score function (score_mod)",
    "head_mask": "a head mask (head_mask)",
    "output_attentions": "returning attention weights (output_attentions)",
    "sinks": "sink logits per token (sinks)",
    "indices": "sparse attention (indices)",
    "block_indices": "sparse attention (block_indices)",
    "cache": "a paged cache (cache)",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens_k)",
}


def register_with_transformers() -> None:
    """Let any transformers model take `attn_implementation="quernstone"`.

    Registers an attention function and, under the same name, a mask function: without one
    transformers passes no mask at all, and padding is attended silently. Calling it again
    changes nothing.

    Right, and equal to eager attention up to rounding: causal, bidirectional and cross-attention,
    grouped heads, padding on the left or right, sliding windows, static and dynamic caches,
    learned sinks (`s_aux`), a value width unlike the key width, fp32, bf16 and torch.autocast, and
    the gradients of all inputs.

    Refused with a ValueError that names it: dropout, soft-capping, position and attention biases,
    head masks, `output_attentions`, dense mask tensors, padding between tokens, packed sequences,
    mask functions of the user, chunked attention beyond the first chunk, paged caches. A model
    with attention dropout must be trained with a rate of 0.

    Raises:
        ImportError: transformers is not installed.

    Source: transformers 5.23, `AttentionInterface` and `AttentionMaskInterface`. Oracle: the same
    model with `attn_implementation="eager"`.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_with_transformers needs transformers 5: pip install 'quernstone[attention]'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # It reads the closures of transformers' mask functions, which torch.compile does not trace.
    AttentionMaskInterface.register(NAME, torch.compiler.disable(key_mask))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    gate: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register_with_transformers` registers.

    Args:
        module: the layer; `is_causal` is read from it where no argument gives it.
        query: [b, h, t, d].
        key, value: [b, g, s, d]; the value may have a width of its own.
        attention_mask: what `key_mask` made. It says everything about visibility, as a mask
            tensor does with eager attention; None leaves that to `is_causal` and
            `sliding_window`.
        scaling: factor of q.k; None is d**-0.5.
        s_aux: [h] sink logits.
        gate: [b, h, t] or [b, h, t, d] gate logits, from `fuse_gates`.

    Returns:
        [b, t, h, d], and None in the place of the attention weights.

    Raises:
        ValueError: see `register_with_transformers`.
    """
    if dropout > 0.0:
        refuse(f"dropout (got {dropout})", "call model.eval() or set the rate to 0")
    for name, what in _UNSUPPORTED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            refuse(what)
    if s_aux is not None and gate is not None:
        refuse("sinks and a gate in one layer")
    mask = _resolve(module, query, key, attention_mask, is_causal, sliding_window)
    query, key, value = autocast(query, key, value)
    if gate is not None:
        (gate,) = autocast(gate)

    width, value_width = query.shape[-1], value.shape[-1]
    if value_width != width:
        # Zeros beside q and k leave their product as it is, zeros beside v are cut off below.
        scaling = width**-0.5 if scaling is None else scaling
        wide = max(width, value_width)
        query, key = (functional.pad(x, (0, wide - width)) for x in (query, key))
        value = functional.pad(value, (0, wide - value_width))
    options: dict[str, Any] = {
        # Plain attention is the kind that leaves the output alone.
        "kind": "sink" if s_aux is not None else "gated" if gate is not None else "vanilla",
        "sinks": s_aux,
        "gate": gate,
        "causal": mask.causal,
        "window": mask.window,
        "scale": scaling,
        "key_start": mask.key_start,
        "key_lengths": mask.key_lengths,
    }
    tensors = query, key[:, :, : mask.used], value[:, :, : mask.used]
    probe = module.__dict__.get(PROBE)
    if probe is None:
        out = sink_attention(*tensors, **options)
    else:
        out = probe(module, tensors, options, mask)
    return out[..., :value_width].transpose(1, 2).contiguous(), None


@contextmanager
def probed(model: nn.Module, probe: Callable[..., Tensor]) -> Iterator[None]:
    """Puts `probe(module, (q, k, v), options, mask)` in the place of `sink_attention`.

    Somebody may be watching the model already; afterwards he watches again.
    """
    before = [(module, module.__dict__.get(PROBE)) for module in model.modules()]
    for module, _ in before:
        module.__dict__[PROBE] = probe
    try:
        yield
    finally:
        for module, other in before:
            if other is None:
                del module.__dict__[PROBE]
            else:
                module.__dict__[PROBE] = other


def _resolve(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: KeyMask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> KeyMask:
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if causal and queries not in (1, keys):
            refuse(
                f"causal attention of {queries} queries to {keys} keys without an attention_mask"
            )
        return KeyMask(batch, queries, keys, keys, causal, sliding_window)
    if not isinstance(mask, KeyMask):
        refuse(
            f"a dense attention_mask (got {tuple(mask.shape)}, {mask.dtype})",
            "pass the padding mask [batch, keys]",
        )
    if (mask.batch, mask.queries, mask.keys) != (batch, queries, keys):
        refuse(
            f"a mask for {mask.batch} x {mask.queries} queries and {mask.keys} keys in a layer "
            f"with {batch} x {queries} and {keys}"
        )
    return mask
