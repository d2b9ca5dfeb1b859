"""A self-attention layer with a sink or a gate, and the weight layouts of other gated layers.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width, e model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from quernstone.attention.api import sink_attention
from quernstone.attention.autocast import autocast
from quernstone.attention.hf import PROBE
from quernstone.attention.hf_mask import KeyMask
from quernstone.attention.types import Kind

Cache = tuple[Tensor, Tensor]
"""Keys and values, [b, g, s, d] each."""

Rotary = tuple[Tensor, Tensor] | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

GateLayout = Literal["qwen3_next", "gated_attention"]


class SinkAttention(nn.Module):
    """Multi-head self-attention over `sink_attention`, with its projections.

    `HeadBalancer` reads the importance of its heads. There is no dropout.

    Args:
        embed_dim: e, width of the input and output.
        num_heads: h.
        num_kv_heads: g, a divisor of h; None is h.
        head_dim: d, 16 to 256; None is e / h.
        kind: "sink" learns `sinks` [h], "gated" a gate from the input, "vanilla" neither.
        gate: of kind "gated": "head", one number per head and token, or "element", d of them.
        bias: of the projections of queries, keys, values and gates.
        out_bias: of the output projection; None is `bias`.
        causal, window, scale: as in `sink_attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes out of range or that do not divide each other, an unknown kind or gate.

    Source: arXiv 2602.01203 (kinds), arXiv 2505.06708 (gates). Oracles: nn.MultiheadAttention
    (vanilla), the attention of gpt-oss (sink) and of Qwen3-Next (gated) in transformers.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kind: Kind = "sink",
        gate: Literal["head", "element"] = "head",
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, x in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if x < 1:
                raise ValueError(f"{name}: got {x}, expected 1 or more")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim: got {embed_dim}, expected a multiple of the {num_heads} heads or "
                    "a head_dim"
                )
            head_dim = embed_dim // num_heads
        if not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim: got {head_dim}, expected 16 to 256")
        if kind not in get_args(Kind):
            raise ValueError(f"kind: got {kind!r}, expected 'sink', 'vanilla' or 'gated'")
        if gate not in ("head", "element"):
            raise ValueError(f"gate: got {gate!r}, expected 'head' or 'element'")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kind: Kind = kind
        self.gate = gate
        self.causal = causal
        self.window = window
        self.scale = scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias if out_bias is None else out_bias, **factory)
        self.sinks: nn.Parameter | None
        self.gate_proj: nn.Linear | None
        if kind == "sink":
            self.sinks = nn.Parameter(torch.empty(num_heads, **factory))
        else:
            self.register_parameter("sinks", None)
        if kind == "gated":
            outputs = num_heads if gate == "head" else width
            self.gate_proj = nn.Linear(embed_dim, outputs, bias, **factory)
        else:
            self.gate_proj = None
        self._reset_sinks()

    def reset_parameters(self) -> None:
        """Draw the projections again; sinks are 0, one more key whose logit is 0."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj):
            if layer is not None:
                layer.reset_parameters()
        self._reset_sinks()

    def _reset_sinks(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        kind = f"kind={self.kind!r}" + (f", gate={self.gate!r}" if self.kind == "gated" else "")
        mask = f"causal={self.causal}, window={self.window}"
        return f"{self.embed_dim}, {heads}, head_dim={self.head_dim}, {kind}, {mask}"

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        key_start: Tensor | None = None,
        key_lengths: Tensor | None = None,
        past: Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Attend.

        Args:
            x: [b, t, e], dtype of the parameters; under torch.autocast any.
            rotary: what turns queries [b, h, t, d] and keys [b, g, t, d] before they are cached:
                (cos, sin), [t, d] or [b, t, d] each, whose two halves of d turn together as in
                Llama; or a function of both that may do anything, such as normalise them too.
            key_start: [b] int, first token of each sequence (left padding).
            key_lengths: [b] int, end of the sequences (right padding); without `past`.
            past: keys and values of the tokens before x.
            use_cache: return keys and values, `past` for the next call.

        Returns:
            [b, t, e], with `use_cache` also (keys, values), [b, g, s, d] each.

        Raises:
            ValueError: x of another shape, `key_lengths` beside `past`, and what `sink_attention`
                refuses.
        """
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            got = tuple(x.shape)
            raise ValueError(f"x.shape: got {got}, expected (batch, tokens, {self.embed_dim})")
        if key_lengths is not None and past is not None:
            raise ValueError(
                "key_lengths: got a tensor beside past, expected None: pad on the left"
            )
        q = self.q_proj(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        heads = (self.num_kv_heads, self.head_dim)
        k = self.k_proj(x).unflatten(2, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, heads).transpose(1, 2)
        if callable(rotary):
            q, k = rotary(q, k)
        elif rotary is not None:
            q, k = (_rotate(y, *rotary) for y in (q, k))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = self._attend(q, k, v, x, key_start, key_lengths)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return (out, (k, v)) if use_cache else out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        key_start: Tensor | None,
        key_lengths: Tensor | None,
    ) -> Tensor:
        gate = None
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            if self.gate == "element":
                gate = gate.unflatten(2, (self.num_heads, self.head_dim))
            (gate,) = autocast(gate.transpose(1, 2))
        q, k, v = autocast(q, k, v)
        options: dict[str, Any] = {
            "kind": self.kind,
            "sinks": self.sinks,
            "gate": gate,
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "key_start": key_start,
            "key_lengths": key_lengths,
        }
        probe = self.__dict__.get(PROBE)
        if probe is None:
            plain: Tensor = sink_attention(q, k, v, **options)
            return plain
        if (key_start is None) != (key_lengths is None):
            # A mask has both or none.
            zeros = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
            key_start = zeros if key_start is None else key_start
            key_lengths = zeros + k.shape[2] if key_lengths is None else key_lengths
        sizes = q.shape[0], q.shape[2], k.shape[2], k.shape[2]
        mask = KeyMask(*sizes, self.causal, self.window, key_start, key_lengths)
        probed: Tensor = probe(self, (q, k, v), options, mask)
        return probed


def split_gate(
    q_proj: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    layout: GateLayout,
) -> tuple[Tensor, Tensor]:
    """The weights of queries and gates from a q_proj that yields both.

        q, gate = split_gate(other.q_proj.weight, ..., layout="qwen3_next")
        layer.q_proj.weight, layer.gate_proj.weight = nn.Parameter(q), nn.Parameter(gate)

    Args:
        q_proj: weight [n, e] or bias [n]; n = h d + h (a gate per head) or 2 h d (per element).
        num_heads, num_kv_heads, head_dim: h, g, d.
        layout: order of the rows. "qwen3_next": d queries and the gates, head by head.
            "gated_attention", the code of the paper on gated attention: the queries of all h / g
            heads that share a key head, then their gates, key head by key head.

    Returns:
        Rows of the queries [h d, ...] and of the gates [h, ...] or [h d, ...], copies, in the
        order of `SinkAttention`.

    Raises:
        ValueError: another number of rows, or an unknown layout.

    Source: Qwen3-Next in transformers; arXiv 2505.06708 and its published model code. Oracles:
    both layers' own forward.
    """
    queries = num_heads * head_dim
    rows = q_proj.shape[0]
    if rows not in (queries + num_heads, 2 * queries):
        raise ValueError(
            f"q_proj.shape[0]: got {rows}, expected {queries + num_heads} or {2 * queries}"
        )
    if layout not in get_args(GateLayout):
        raise ValueError(f"layout: got {layout!r}, expected 'qwen3_next' or 'gated_attention'")
    groups = num_heads if layout == "qwen3_next" else num_kv_heads
    grouped = q_proj.detach().unflatten(0, (groups, -1))
    q, gate = grouped.split([queries // groups, (rows - queries) // groups], dim=1)
    return q.flatten(0, 1).clone(), gate.flatten(0, 1).clone()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
