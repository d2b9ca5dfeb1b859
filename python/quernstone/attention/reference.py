"""Sink attention in plain fp64 torch: the readable twin that the kernels are held to.

Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from quernstone.attention.types import Aux, Kind

_NEVER = float("-inf")


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    key_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query sees.

    Query t stands at position t + s - t_total: the last query is level with the last key of the
    tensor, whatever `key_lengths` says.

    Args:
        queries: number of queries.
        keys: number of keys.
        causal: a query sees no key after its position.
        window: a query sees `window` keys up to and including its position; when not causal also
            `window - 1` keys after it. None sees all.
        key_start: [b] first key of each sequence (left padding).
        key_lengths: [b] end, exclusive, of the keys of each sequence (right padding).
        device: where the result is wanted, and where `key_start` and `key_lengths` are.

    Returns:
        bool [b, 1, t, s], true where the key is seen; b is 1 without `key_start` and `key_lengths`.
    """
    position = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
        if not causal:
            seen = seen & (key < position + window)
    if key_start is not None:
        seen = seen & (key >= key_start.view(-1, 1, 1, 1))
    if key_lengths is not None:
        seen = seen & (key < key_lengths.view(-1, 1, 1, 1))
    return seen


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
    """Attention with a gate per head and token, in fp64, differentiable by autograd.

    With A = softmax of the scaled logits over the visible keys, O~ = A v and LSE their
    log-sum-exp (natural logarithm, the sink left out), the kinds are

        sink     G = sigmoid(LSE - sinks[h])        out = G O~
        vanilla  G = sigmoid(LSE_rest - s_first)    out = O~
        gated    G = sigmoid(gate)                  out = G O~

    where s_first is the scaled logit of the first key, `key_start[b]`, and LSE_rest leaves that
    key out. Each G is a sigmoid and never 1 - exp(...), which is 0 in fp32 for a gate below 6e-8.
    A query without a visible key has out = 0, G = 0 and lse = -inf. A NaN in a key that some
    queries see reaches the others too here (0 times NaN); the kernels keep it from them.

    Args:
        q: [b, h, t, d] queries, of any floating type; all arithmetic is in fp64.
        k: [b, g, s, d] keys.
        v: [b, g, s, d] values.
        kind: "sink", "vanilla" or "gated".
        sinks: [h] logit of a key that has no value, kind "sink" only; -inf is plain attention.
        gate: [b, h, t] or [b, h, t, d] gate logits, kind "gated" only.
        causal, window, key_start, key_lengths: the mask, see `visible`.
        scale: factor of q.k; None is d**-0.5.
        token_mask: bool [b, t], the tokens over which importance is averaged; None is all.
        return_aux: return `Aux` too.

    Returns:
        out, fp64 [b, h, t, d]; with `return_aux` also Aux(lse fp64 [b, h, t], importance fp64 [h]).
        Importance is the mean of G over the tokens of `token_mask` that see a key (vanilla: a key
        other than the first), and over d for an element-wise gate; 0 when no token counts.

    Raises:
        ValueError: an unknown kind; `sinks`, `gate` or `token_mask` missing or superfluous. Shapes
            are not checked here: this is an oracle for inputs that the public function accepts.

    Source: arXiv 2602.01203 (gates of the three kinds, importance of a head). Oracles: autograd's
    gradcheck, the eager attention of gpt-oss in transformers, torch's scaled_dot_product_attention.
    """
    if kind not in ("sink", "vanilla", "gated"):
        raise ValueError(f"kind: got {kind!r}, expected 'sink', 'vanilla' or 'gated'")
    if token_mask is not None and not return_aux:
        raise ValueError("token_mask: got a tensor, expected None without return_aux=True")

    queries, keys, width = q.shape[2], k.shape[2], q.shape[3]
    group = q.shape[1] // k.shape[1]
    q = q.double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))

    seen = visible(
        queries,
        keys,
        causal=causal,
        window=window,
        key_start=key_start,
        key_lengths=key_lengths,
        device=q.device,
    )
    # A key that no query sees may hold anything, NaN too: the unused end of a cache.
    v = v.masked_fill(~seen.any(dim=2).unsqueeze(-1), 0.0)
    logits = (q @ k.mT) * (width**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen, _NEVER)

    lse = logits.logsumexp(-1)
    sees_a_key = seen.any(-1)
    finite_lse = lse.masked_fill(~sees_a_key, 0.0)
    plain = (logits - finite_lse.unsqueeze(-1)).exp() @ v

    counted = sees_a_key
    if kind == "vanilla":
        start = q.new_zeros(1, dtype=torch.int64) if key_start is None else key_start
        first = torch.arange(keys, device=q.device) == start.view(-1, 1, 1, 1)
        lse_first = logits.masked_fill(~first, _NEVER).logsumexp(-1)
        lse_rest = logits.masked_fill(first, _NEVER).logsumexp(-1)
        g = _sigmoid(lse_rest - lse_first)
        counted = (seen & ~first).any(-1)
    elif kind == "sink":
        g = _sigmoid(finite_lse - _required(sinks, "sinks", kind).double().view(-1, 1))
    else:
        g = _sigmoid(_required(gate, "gate", kind).double())
    if sinks is not None and kind != "sink":
        raise ValueError(f"sinks: got a tensor, expected None with kind={kind!r}")
    if gate is not None and kind != "gated":
        raise ValueError(f"gate: got a tensor, expected None with kind={kind!r}")

    # An element-wise gate has the axes of out, any other one width for all channels.
    g = g if g.dim() == 4 else g.unsqueeze(-1)
    g = g.where(sees_a_key.unsqueeze(-1), 0.0)
    out = plain if kind == "vanilla" else g * plain
    if not return_aux:
        return out

    tokens = counted.expand(q.shape[0], 1, queries)
    if token_mask is not None:
        tokens = tokens & token_mask.unsqueeze(1)
    total = g.mean(-1).where(tokens, 0.0).sum(dim=(0, 2))
    return out, Aux(lse, total / tokens.sum().clamp(min=1))


def _sigmoid(x: Tensor) -> Tensor:
    """Autograd's own, y (1 - y), is 0 where y rounds to 1."""
    return logsigmoid(x).exp()


def _required(tensor: Tensor | None, name: str, kind: Kind) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name}: got None, expected a tensor with kind={kind!r}")
    return tensor
