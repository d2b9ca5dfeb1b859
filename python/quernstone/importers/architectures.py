"""Graphs of state dicts: what a file of weights alone does not say is known for BERT and Llama.

Axes: b batch, t tokens, h heads, g key heads, d head width, c channels, n what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from quernstone.importers.graph import Array, Graph, Node, Value, check_weights

_FREE = (None, None)
# Large enough to leave nothing of a masked key, and finite: a row may be masked as a whole.
_MASKED = np.float32(-1e9)


def from_state_dict(state: Mapping[str, Any], config: Mapping[str, Any]) -> Graph:
    """The graph of a state dict of a BERT encoder or a Llama language model.

    BERT takes input_ids, attention_mask and token_type_ids [b, t], int64, and gives
    last_hidden_state [b, t, c]. Llama takes input_ids [b, t] and gives logits [b, t, vocabulary].

    Args:
        state: arrays or tensors under the names that transformers gives them; more than the network
            needs, such as a pooler, is left out.
        config: what transformers has in config.json; `model_type` is "bert" or "llama".

    Returns:
        The graph, whose constants bear the names in the state dict.

    Raises:
        ValueError: another `model_type`, settings that it does not know, weights that are missing,
            of another shape or not finite.

    Oracle: transformers.
    """
    kind = config.get("model_type")
    if kind not in _BUILD:
        raise ValueError(f"model_type: got {kind!r}, expected one of {', '.join(_BUILD)}")
    builder = _Builder(state, config)
    _BUILD[kind](builder)
    return check_weights(builder.graph())


class _Builder:
    def __init__(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.state, self.config = state, config
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}
        self.inputs: list[Value] = []
        self.outputs: list[str] = []

    def graph(self) -> Graph:
        return Graph(
            tuple(self.nodes), tuple(self.inputs), tuple(self.outputs), self.constants
        ).without_dead_ends()

    def setting(self, name: str, default: Any = None) -> Any:
        """A number above 0."""
        value = self.config.get(name, default)
        if value is None:
            raise ValueError(f"config: {name} is missing")
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"config: {name} is {value!r}, expected a number above 0")
        return value

    def whole(self, name: str, *divisors: int) -> None:
        """Refuses a number of which a divisor is none."""
        for divisor in divisors:
            if self.setting(name) % divisor:
                value = self.setting(name)
                raise ValueError(f"config: {name} is {value}, expected a multiple of {divisor}")

    def only(self, name: str, *known: Any) -> None:
        """Refuses a setting that would need other nodes."""
        if self.config.get(name, known[0]) not in known:
            raise ValueError(f"config: {name} is {self.config[name]!r}, expected one of {known}")

    def weight(self, name: str, *shape: int) -> str:
        if name not in self.constants:
            if name not in self.state:
                raise ValueError(f"state: {name!r} is missing")
            value = self.state[name]
            if isinstance(value, torch.Tensor):
                value = value.detach().float().cpu().numpy()
            self.constants[name] = np.asarray(value, np.float32)
        got = self.constants[name].shape
        if got != shape:
            raise ValueError(f"state[{name!r}]: got shape {got}, expected {shape}")
        return name

    def number(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.array(value, dtype)
        name = f"{array.dtype}[{', '.join(map(str, array.reshape(-1).tolist()))}]{array.shape}"
        self.constants[name] = array
        return name

    def emit(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output, which bears its name."""
        self.nodes.append(Node(name, op, inputs, (f"{name}.out",), attributes))
        return self.nodes[-1].outputs[0]

    def linear(self, name: str, x: str, out: int, inner: int, *, bias: bool = True) -> str:
        constants = [self.weight(f"{name}.weight", out, inner)]
        if bias:
            constants.append(self.weight(f"{name}.bias", out))
        return self.emit("linear", name, x, *constants)

    def heads(self, x: str, count: int, width: int) -> str:
        """[b, t, c] to [b, h, t, d]."""
        apart = self.emit("reshape", f"{x}.apart", x, self.number([0, 0, count, width]))
        return self.emit("transpose", f"{x}.heads", apart, axes=(0, 2, 1, 3))

    def joined(self, x: str) -> str:
        """[b, h, t, d] to [b, t, c]."""
        turned = self.emit("transpose", f"{x}.turned", x, axes=(0, 2, 1, 3))
        return self.emit("reshape", f"{x}.joined", turned, self.number([0, 0, -1]))

    def finish(self, name: str, x: str) -> None:
        """Names what a node made as an output of the graph."""
        last = self.nodes.pop()
        assert last.outputs == (x,)
        self.nodes.append(Node(last.name, last.op, last.inputs, (name,), last.attributes))
        self.outputs.append(name)


def _bert(b: _Builder) -> None:
    b.only("hidden_act", "gelu")
    b.only("position_embedding_type", "absolute")
    c, layers = b.setting("hidden_size"), b.setting("num_hidden_layers")
    h, wide = b.setting("num_attention_heads"), b.setting("intermediate_size")
    eps = b.setting("layer_norm_eps", 1e-12)
    b.whole("hidden_size", h)
    root = "bert." if any(name.startswith("bert.") for name in b.state) else ""
    b.inputs += [
        Value(name, "int64", _FREE) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]

    def norm(name: str, x: str) -> str:
        weights = (b.weight(f"{name}.{role}", c) for role in ("weight", "bias"))
        return b.emit("layer_norm", name, x, *weights, eps=eps)

    at = f"{root}embeddings"
    tables = {
        "word_embeddings": ("vocab_size", "input_ids"),
        "token_type_embeddings": ("type_vocab_size", "token_type_ids"),
    }
    rows = {
        part: b.emit("embedding", f"{at}.{part}", ids, b.weight(f"{at}.{part}.weight",
                                                                b.setting(size), c))
        for part, (size, ids) in tables.items()
    }  # fmt: skip
    places = b.weight(f"{at}.position_embeddings.weight", b.setting("max_position_embeddings"), c)
    shape = b.emit("shape", f"{at}.shape", "input_ids")
    whole = {"axes": (0,), "steps": (1,)}
    length = b.emit("slice", f"{at}.length", shape, b.number([1]), b.number([2]), **whole)
    begun = b.emit("slice", f"{at}.positions", places, b.number([0]), length, **whole)
    kinds = b.emit("add", f"{at}.kinds", rows["word_embeddings"], rows["token_type_embeddings"])
    x = norm(f"{at}.LayerNorm", b.emit("add", f"{at}.sum", kinds, begun))

    # 0 where a key is seen, far below elsewhere, [b, 1, 1, t].
    kept = b.emit("cast", "mask.float", "attention_mask", dtype="float32")
    hidden = b.emit("sub", "mask.hidden", b.number(1, np.float32), kept)
    low = b.emit("mul", "mask.low", hidden, b.number(_MASKED, np.float32))
    mask = b.emit("unsqueeze", "mask", low, axes=(1, 2))

    for index in range(layers):
        at = f"{root}encoder.layer.{index}"
        q, k, v = (
            b.heads(b.linear(f"{at}.attention.self.{part}", x, c, c), h, c // h)
            for part in ("query", "key", "value")
        )
        scale = (c // h) ** -0.5
        mixed = b.emit("attention", f"{at}.attention.self", q, k, v, mask, scale=scale)
        out = b.linear(f"{at}.attention.output.dense", b.joined(mixed), c, c)
        x = norm(
            f"{at}.attention.output.LayerNorm", b.emit("add", f"{at}.attention.output", out, x)
        )
        inner = b.linear(f"{at}.intermediate.dense", x, wide, c)
        bent = b.emit("gelu", f"{at}.intermediate", inner)
        out = b.linear(f"{at}.output.dense", bent, c, wide)
        x = norm(f"{at}.output.LayerNorm", b.emit("add", f"{at}.output", out, x))
    b.finish("last_hidden_state", x)


def _llama(b: _Builder) -> None:
    b.only("hidden_act", "silu")
    b.only("attention_bias", False)
    b.only("mlp_bias", False)
    b.only("rope_scaling", None)
    c, layers = b.setting("hidden_size"), b.setting("num_hidden_layers")
    h, wide = b.setting("num_attention_heads"), b.setting("intermediate_size")
    g = b.setting("num_key_value_heads", h)
    d = b.config.get("head_dim") or c // h
    b.whole("num_attention_heads", g)
    if h > c:
        raise ValueError(f"config: num_attention_heads is {h}, hidden_size is {c}")
    eps, vocabulary = b.setting("rms_norm_eps"), b.setting("vocab_size")
    rope = b.config.get("rope_parameters") or {}
    base = float(b.config.get("rope_theta") or rope.get("rope_theta") or 1e4)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config: rope_type is {rope['rope_type']!r}, expected 'default'")
    b.inputs.append(Value("input_ids", "int64", _FREE))
    # Which key head a query head looks at.
    shared = b.number(np.arange(h) // (h // g)) if g != h else ""

    def norm(name: str, x: str) -> str:
        return b.emit("rms_norm", name, x, b.weight(f"{name}.weight", c), eps=eps)

    def linear(name: str, x: str, out: int, inner: int) -> str:
        return b.linear(name, x, out, inner, bias=False)

    table = b.weight("model.embed_tokens.weight", vocabulary, c)
    x = b.emit("embedding", "model.embed_tokens", "input_ids", table)
    for index in range(layers):
        at = f"model.layers.{index}"
        seen = norm(f"{at}.input_layernorm", x)
        q = b.heads(linear(f"{at}.self_attn.q_proj", seen, h * d, c), h, d)
        k = b.heads(linear(f"{at}.self_attn.k_proj", seen, g * d, c), g, d)
        v = b.heads(linear(f"{at}.self_attn.v_proj", seen, g * d, c), g, d)
        q = b.emit("rotary", f"{at}.self_attn.q_rotary", q, base=base)
        k = b.emit("rotary", f"{at}.self_attn.k_rotary", k, base=base)
        if shared:
            k = b.emit("gather", f"{at}.self_attn.k_shared", k, shared, axis=1)
            v = b.emit("gather", f"{at}.self_attn.v_shared", v, shared, axis=1)
        options = {"scale": d**-0.5, "causal": True}
        mixed = b.emit("attention", f"{at}.self_attn", q, k, v, **options)
        out = linear(f"{at}.self_attn.o_proj", b.joined(mixed), c, h * d)
        x = b.emit("add", f"{at}.attended", x, out)
        seen = norm(f"{at}.post_attention_layernorm", x)
        gate = b.emit("silu", f"{at}.mlp.gate", linear(f"{at}.mlp.gate_proj", seen, wide, c))
        up = linear(f"{at}.mlp.up_proj", seen, wide, c)
        both = b.emit("mul", f"{at}.mlp.product", gate, up)
        x = b.emit("add", at, x, linear(f"{at}.mlp.down_proj", both, c, wide))
    x = norm("model.norm", x)
    head = "model.embed_tokens" if b.config.get("tie_word_embeddings", False) else "lm_head"
    head = b.weight(f"{head}.weight", vocabulary, c)
    b.finish("logits", b.emit("linear", "lm_head", x, head))


_BUILD: dict[str, Callable[[_Builder], None]] = {"bert": _bert, "llama": _llama}
