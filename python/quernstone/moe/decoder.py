"""Steps of a whole accelerated model with little Python between the products.

A step of transformers spends as long on norms, rotations, masks and caches, each a handful of small
operations, as a small model spends on its weights. For one sequence without padding those are two
compiled calls a layer here, around attention and the experts; keys and values are written to where
they stay, in a cache that grows by doubling. Between the layers numbers are fp32.

Axes: t tokens, m hidden width, h query heads, g key heads, s keys, d head width.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quernstone import _core
from quernstone.attention import sink_attention
from quernstone.moe.block import PackedBlock
from quernstone.moe.kv import GrowingLayer, adopted
from quernstone.quant.linear import PackedLinear, PackedMatrix

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
# What a caller may pass that changes nothing here; anything else is for transformers.
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_IGNORED = {"return_dict": (True,), **dict.fromkeys(_OUTPUTS, (False,))}
_FIRST_CAPACITY = 256


def _numbers(x: Tensor) -> NDArray[Any]:
    """The memory of an fp32 tensor, or of a bf16 one as int16."""
    array: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


@overload
def _floats(x: Tensor) -> NDArray[np.float32]: ...
@overload
def _floats(x: None) -> None: ...
def _floats(x: Tensor | None) -> NDArray[np.float32] | None:
    return None if x is None else x.detach().float().contiguous().numpy()


class Decoder:
    """The compiled steps of a model whose blocks and linear layers are packed.

    Args:
        model: a causal language model of transformers after `accelerate` has replaced its layers.

    Raises:
        ValueError: it is of another structure, see `unsupported`.
    """

    def __init__(self, model: nn.Module) -> None:
        why = unsupported(model)
        if why is not None:
            raise ValueError(f"model: got {why}, expected what the compiled decoder has")
        whole: Any = model
        config = self._config = whole.config
        inner = whole.model
        self._embedding, self._head = inner.embed_tokens, whole.lm_head
        self._norm, self._eps = _floats(inner.norm.weight), float(inner.norm.variance_epsilon)
        self._rotary = inner.rotary_emb
        self.layers = [_Layer(layer, config) for layer in inner.layers]
        self._dtype: torch.dtype = inner.embed_tokens.weight.dtype
        empty = np.empty((0, 0), np.float32)
        self._rotations: tuple[NDArray[np.float32], NDArray[np.float32]] = empty, empty
        self._hooks = [
            hooks
            for module in model.modules()
            if module is not model
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._tables = [
            table for owner in model.modules() for table in (owner._modules, owner._parameters)
        ]
        self._parts = _parts(self._tables)
        self._written = _written(self._parts)
        # Of steps of one token that do not run; each step has one to itself.
        self._rooms: list[_Room] = []

    def holds(self, model: Any) -> bool:
        """Whether a model has the layers and parameters that it had, and none was written to."""
        parts = _parts(self._tables)
        return (
            model._modules is self._tables[0]
            and len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and _written(parts) == self._written
        )

    def takes(
        self,
        input_ids: Tensor | None,
        cache: Any,
        attention_mask: Any,
        position_ids: Tensor | None,
        logits_to_keep: Any,
        others: dict[str, Any],
    ) -> bool:
        """Whether a step gives what transformers would, with nothing that this leaves out."""
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[0] != 1:
            return False
        tokens = input_ids.shape[1]
        if not tokens or type(logits_to_keep) is not int or logits_to_keep < 0:
            return False
        if self._embedding.weight.dtype is not self._dtype:  # the model was cast since
            return False
        for name in _OUTPUTS:
            if others.get(name) is None and getattr(self._config, name, False):
                return False
        for name, value in others.items():
            if value is not None and not (name in _IGNORED and value in _IGNORED[name]):
                return False
        if any(self._hooks) and self._watched():
            return False
        past = 0
        if cache is not None:
            if not adopted(cache, len(self.layers)):
                return False
            lengths = {layer.get_seq_length() for layer in cache.layers} or {0}
            if len(lengths) != 1:
                return False
            past = lengths.pop()
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                return False
            if attention_mask.shape[1] != past + tokens or not bool(attention_mask.all()):
                return False
        if position_ids is not None:
            if tuple(position_ids.shape) != (1, tokens):
                return False
            if tokens == 1:
                return int(position_ids) == past
            return torch.equal(position_ids[0], torch.arange(past, past + tokens, device="cpu"))
        return True

    def __call__(self, input_ids: Tensor, cache: Any, keep: int) -> Tensor:
        """Logits [1, keep, vocabulary] of the last tokens, of all where `keep` is 0.

        A step that fails leaves the cache as it was.

        Args:
            input_ids: [1, t].
            cache: one that `takes` has taken, or None.
        """
        tokens = input_ids.shape[1]
        past = 0 if cache is None else cache.layers[0].get_seq_length()
        end = past + tokens
        kept = [GrowingLayer() for _ in self.layers] if cache is None else cache.layers
        cos, sin = self._rotation(past, end)
        room = self._take_room(tokens)
        hidden = self._embedding(input_ids[0]).float()
        numbers, add = hidden.numpy(), None
        for layer, keys in zip(self.layers, kept, strict=True):
            add = layer.step(numbers, add, cos, sin, room, keys, past)
        last = tokens if keep == 0 else min(keep, tokens)
        out = torch.empty(last, hidden.shape[1], dtype=torch.float32, device="cpu")
        assert add is not None
        _core.moe.final_norm(
            self._norm, self._eps, numbers[tokens - last :], add[tokens - last :], out.numpy()
        )
        logits: Tensor = self._head(out)
        for keys in kept:
            keys.commit(end)
        if tokens == 1:
            self._rooms.append(room)
        return logits.to(self._dtype)[None]

    def _rotation(self, begin: int, end: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        cos, sin = self._rotations
        if len(cos) < end:
            positions = torch.arange(max(2 * end, _FIRST_CAPACITY), device="cpu")[None]
            cos, sin = self._rotary(torch.empty(0, dtype=torch.float32, device="cpu"), positions)
            cos, sin = cos[0].contiguous().numpy(), sin[0].contiguous().numpy()
            self._rotations = cos, sin  # both at once: other threads read them
        return cos[begin:end], sin[begin:end]

    def _watched(self) -> bool:
        """Whether somebody has hooks on a part of the model that would not be called.

        Those of transformers for hidden states and router logits sleep unless these are asked for.
        """
        return any(
            getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
            for hooks in self._hooks
            for hook in hooks.values()
        )

    def _take_room(self, tokens: int) -> _Room:
        if tokens == 1:
            with contextlib.suppress(IndexError):
                return self._rooms.pop()
        return _Room(self.layers[0], tokens, self._dtype)


def _parts(tables: list[dict[str, Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(table.values() for table in tables))


def _written(parts: list[Any]) -> list[int]:
    """How often each parameter was written to, where torch counts that."""
    return [one._version for one in parts if isinstance(one, Tensor) and not one.is_inference()]


class _Layer:
    """One decoder layer: what is compiled of it, and its experts."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, block = layer.self_attn, layer.mlp
        router = block.gate
        qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        assert qkv is not None
        self.width: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.width
        self.kv_heads = attention.k_proj.out_features // self.width
        self.hidden: int = config.hidden_size
        self.choices: int = router.top_k + block.shared
        self.scale: float = attention.scaling
        self.block: PackedBlock = block
        self.experts = block.experts
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        gate = block.shared_expert_gate
        matrix, bias = qkv
        out = attention.o_proj
        self._core = _core.moe.DecoderLayer(
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.width,
            qkv_layout=matrix.layout,
            qkv=matrix.data,
            qkv_compute=attention.q_proj.compute,
            out_layout=out.matrix.layout,
            out=out.matrix.data,
            out_compute=out.compute,
            norm_in=_floats(layer.input_layernorm.weight),
            eps_in=layer.input_layernorm.variance_epsilon,
            norm_out=_floats(layer.post_attention_layernorm.weight),
            eps_out=layer.post_attention_layernorm.variance_epsilon,
            router=_floats(router.weight),
            top_k=router.top_k,
            # Mixtral's router has no such setting: it always divides.
            renormalize=bool(getattr(router, "norm_topk_prob", True)),
            shared=block.shared,
            shared_gate=None if gate is None else _floats(gate.weight[0]),
            qkv_bias=bias,
            out_bias=_floats(out.bias),
            norm_q=None if norms[0] is None else _floats(norms[0].weight),
            norm_k=None if norms[1] is None else _floats(norms[1].weight),
            eps_heads=0.0 if norms[0] is None else norms[0].variance_epsilon,
        )

    def step(
        self,
        hidden: NDArray[np.float32],
        add: NDArray[np.float32] | None,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        room: _Room,
        cache: GrowingLayer,
        past: int,
    ) -> NDArray[np.float32]:
        """Adds `add` and the attention's output to hidden [t, m]; what the experts give."""
        keys, values = cache.reserve(past, room.tokens, room.like_keys, room.like_keys)
        new_keys, new_values = cache.arrays(past, room.tokens)
        self._core.inputs(
            hidden, add, cos, sin, room.normed, room.projected, room.q, new_keys, new_values
        )
        attended = sink_attention(room.queries, keys, values, kind="vanilla", scale=self.scale)
        block = self.block
        gating = block.gating
        if gating is None:
            self._core.outputs(
                _numbers(attended)[0], room.joined, hidden, room.x, room.ids, room.weights
            )
        else:
            gating.count(
                *self._core.outputs(
                    _numbers(attended)[0],
                    room.joined,
                    hidden,
                    room.x,
                    room.ids,
                    room.weights,
                    gating.sensitivity[block.name],
                    gating.threshold,
                )
            )
        scores = block.predict(room.inputs) if block.scores else None
        made: Tensor = self.experts(room.inputs, room.chosen, room.shares, scores)
        return made.numpy()


class _Room:
    """What a step of so many tokens writes to and reads again."""

    def __init__(self, layer: _Layer, tokens: int, dtype: torch.dtype) -> None:
        self.tokens = tokens
        heads, width = layer.heads, layer.width
        self.normed = np.empty((tokens, layer.hidden), np.float32)
        self.projected = np.empty((tokens, (heads + 2 * layer.kv_heads) * width), np.float32)
        self.joined = np.empty((tokens, heads * width), np.float32)
        self.queries = torch.empty(1, heads, tokens, width, dtype=dtype, device="cpu")
        self.like_keys = torch.empty(1, layer.kv_heads, 0, width, dtype=dtype, device="cpu")
        self.inputs = torch.empty(tokens, layer.hidden, dtype=torch.float32, device="cpu")
        self.chosen = torch.empty(tokens, layer.choices, dtype=torch.int64, device="cpu")
        self.shares = torch.empty(tokens, layer.choices, dtype=torch.float32, device="cpu")
        self.q = _numbers(self.queries)[0]
        self.x, self.ids = self.inputs.numpy(), self.chosen.numpy()
        self.weights = self.shares.numpy()


def unsupported(model: nn.Module) -> str | None:
    """Why a model has no compiled steps, in words; None where it has."""
    whole: Any = model
    config: Any = whole.config
    inner: Any = getattr(model, "model", None)
    if config.model_type not in ARCHITECTURES:
        return f"the attention of {config.model_type}"
    if inner is None or not isinstance(getattr(model, "lm_head", None), PackedLinear):
        return "a model without a packed output layer"
    if config._attn_implementation != "quernstone":
        return f"the attention {config._attn_implementation!r}"
    if config.rope_parameters.get("rope_type", "default") not in _STATIC_ROPES:
        return f"rotations of type {config.rope_parameters['rope_type']!r}"
    if getattr(config, "clip_qkv", None) is not None:
        return "queries and keys that are clipped"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        config.model_type == "mixtral" and config.sliding_window is not None
    ):
        return "sliding windows"
    for layer in inner.layers:
        attention = layer.self_attn
        if not isinstance(layer.mlp, PackedBlock):
            return "a layer without experts"
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        if not all(isinstance(linear, PackedLinear) for linear in [*linears, attention.o_proj]):
            return "linear layers that are not packed"
        if _joined(linears) is None:
            return "queries, keys and values that are not packed behind one another"
        if getattr(attention, "sliding_window", None) is not None:
            return "sliding windows"
    return None


def _joined(
    linears: list[PackedLinear],
) -> tuple[PackedMatrix, NDArray[np.float32] | None] | None:
    """One matrix of which these are the rows in their order, and its bias."""
    whole = linears[0].matrix.whole
    if whole is None or whole.data.ctypes.data != linears[0].matrix.data.ctypes.data:
        return None
    rows = sum(linear.out_features for linear in linears)
    if rows != whole.shape.outputs or any(linear.matrix.whole is not whole for linear in linears):
        return None
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if not biases:
        return whole, None
    if len(biases) < len(linears):
        return None
    return whole, _floats(torch.cat(biases))
