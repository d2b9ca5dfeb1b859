"""Which heads of a transformers model work, and which rest on the first token or on a sink.

Axes: b batch, l layers, h query heads, g key heads, t queries, s keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from quernstone.attention.api import sink_attention
from quernstone.attention.hf import probed
from quernstone.attention.hf_gates import fuse_gates, unfuse_gates, unfused
from quernstone.attention.hf_mask import KeyMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Array = NDArray[np.float64]
_Tensors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Ablation:
    """What the loss (nats per token) gains when the output of heads is set to zero."""

    loss: float
    """With every head at work."""
    shares: tuple[float, ...]
    """Shares of all heads that were silenced, for the two curves below."""
    least_important: tuple[float, ...]
    """Increase with the heads of lowest importance silenced."""
    random: tuple[float, ...]
    """Increase with as many heads silenced that were drawn at random: the control."""
    single: dict[tuple[int, int], float]
    """Increase with one (layer, head) silenced, of the heads that were asked for."""


@dataclass(frozen=True, eq=False)
class HeadReport:
    """Importance of each attention head of a model on a batch, and what follows from it."""

    layers: tuple[str, ...]
    """Names of the attention layers in the order of their calls."""
    kinds: tuple[str, ...]
    """Gate of each layer: "sink", "gated", or "vanilla" where the first token is the sink."""
    importance: _Array
    """[l, h] mean gate over the tokens that are no padding."""
    first_token: _Array
    """[l, h] mean attention of these tokens to the first one."""
    sink_epsilon: float
    dead_below: float
    ablation: Ablation | None

    @property
    def cv(self) -> _Array:
        """[l] coefficient of variation of the importance over heads (variance over h)."""
        mean = self.importance.mean(1)
        return _ratio(self.importance.std(1), mean)

    @property
    def effective_heads(self) -> _Array:
        """[l] (sum x)^2 / sum x^2 of the importance: h when balanced, 1 when one head does all."""
        return _ratio(self.importance.sum(1) ** 2, (self.importance**2).sum(1))

    @property
    def sink_rate(self) -> float:
        """Share of the heads whose mean attention to the first token exceeds `sink_epsilon`."""
        return float((self.first_token > self.sink_epsilon).mean())

    @property
    def dead_heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads with an importance below `dead_below`."""
        return [(int(x), int(h)) for x, h in np.argwhere(self.importance < self.dead_below)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, ready for JSON."""
        ablation = self.ablation
        return {
            "layers": list(self.layers),
            "kinds": list(self.kinds),
            "importance": self.importance.tolist(),
            "first_token": self.first_token.tolist(),
            "cv": self.cv.tolist(),
            "mean_cv": float(self.cv.mean()),
            "effective_heads": self.effective_heads.tolist(),
            "sink_epsilon": self.sink_epsilon,
            "sink_rate": self.sink_rate,
            "dead_below": self.dead_below,
            "dead_heads": [list(head) for head in self.dead_heads],
            "ablation": ablation
            and {
                "loss": ablation.loss,
                "shares": list(ablation.shares),
                "least_important": list(ablation.least_important),
                "random": list(ablation.random),
                "single": [[*head, gain] for head, gain in ablation.single.items()],
            },
        }

    def figure(self) -> Figure:
        """Heat map of the importance, CV of each layer and, where measured, the ablation."""
        from quernstone.attention.report_figure import draw

        return draw(self)


def head_report(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    ablation: bool = True,
    shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5),
    heads_one_by_one: int = 0,
    sink_epsilon: float = 0.3,
    dead_below: float = 0.1,
    seed: int = 0,
) -> HeadReport:
    """Measure how much each attention head of a transformers model does on a batch.

    The importance of a head is its mean gate, accumulated in the kernel during one forward pass
    of the model: no S x S tensor is made. Gates of Qwen3-Next are fused for the time of the call.

    Args:
        model: in eval mode, loaded with or set to attn_implementation="quernstone".
        batch: keyword arguments of the model, as a tokenizer makes them; tokens that its
            `attention_mask` hides do not count.
        ablation: also measure the loss with heads silenced: `2 * len(shares) + heads_one_by_one`
            forward passes. The loss is the model's own where the batch has `labels`, else that
            of predicting each next token.
        shares: shares of all heads to silence, the least important first and at random.
        heads_one_by_one: number of heads, the least important first, to silence singly.
        sink_epsilon: a head with more mean attention on the first token counts as a sink.
        dead_below: a head of lower importance counts as dead.
        seed: of the random order.

    Returns:
        A `HeadReport`.

    Raises:
        ValueError: no layer uses the "quernstone" attention; the model is in training mode or
            compiled; the layers have different numbers of heads; the batch has a cache; no loss
            can be formed for the ablation; `shares` or `heads_one_by_one` out of range.

    Source: arXiv 2602.01203 (importance, CV, zeroing heads), arXiv 2410.10781 section 3 (sink
    rate: all queries count, the first one with its attention of 1 to itself). Oracle: eager
    attention weights.
    """
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: got a compiled one, expected what torch.compile was given")
    if batch.get("past_key_values") is not None:
        raise ValueError("batch: got past_key_values, expected the whole sequence: passes repeat")
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"shares: got {tuple(shares)}, expected numbers from 0 to 1")
    if heads_one_by_one < 0:
        raise ValueError(f"heads_one_by_one: got {heads_one_by_one}, expected 0 or more")
    fused_here = unfused(model)
    if fused_here:
        fuse_gates(model)
    try:
        collect = _Collect(model)
        _forward(model, batch, collect)
        rows = collect.rows
        if not rows:
            raise ValueError(
                "model: no layer uses the quernstone attention; load it with "
                'attn_implementation="quernstone" after register_with_transformers()'
            )
        if len({len(row.importance) for row in rows}) > 1:
            counts = [len(row.importance) for row in rows]
            raise ValueError(f"model: got {counts} heads per layer, expected equal numbers")
        importance = np.stack([row.importance for row in rows])
        measured = None
        if ablation:
            losses = _Losses(model, batch, importance.shape)
            measured = _ablate(losses, importance, shares, heads_one_by_one, seed)
    finally:
        if fused_here:
            unfuse_gates(model)
    return HeadReport(
        layers=tuple(row.name for row in rows),
        kinds=tuple(row.kind for row in rows),
        importance=importance,
        first_token=np.stack([row.first_token for row in rows]),
        sink_epsilon=sink_epsilon,
        dead_below=dead_below,
        ablation=measured,
    )


@dataclass
class _Row:
    name: str
    kind: str
    importance: _Array
    first_token: _Array


class _Collect:
    """Takes the place of `sink_attention` in a model and writes down what it sees."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.rows: list[_Row] = []

    def __call__(
        self, module: nn.Module, tensors: _Tensors, options: dict[str, Any], mask: KeyMask
    ) -> Tensor:
        tokens = mask.tokens()
        out, aux = sink_attention(*tensors, **options, token_mask=tokens, return_aux=True)
        first = first_token_attention(
            tensors[0],
            tensors[1],
            aux.lse,
            mask,
            scale=options["scale"],
            sinks=options["sinks"],
            token_mask=tokens,
        )
        row = (x.double().numpy() for x in (aux.importance, first))
        self.rows.append(_Row(self.names[id(module)], options["kind"], *row))
        return out


class _Losses:
    """The loss of a model with some of its heads silenced, above the loss with all at work."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.model, self.batch, self.shape = model, batch, shape
        # The importance of a vanilla gate takes the first key apart and changes last digits.
        self.loss = self._without([])

    def gain(self, heads: Sequence[int] | NDArray[np.int64]) -> float:
        """Of silencing heads that are given by their flat index in [l, h]."""
        return self._without(heads) - self.loss

    def _without(self, heads: Sequence[int] | NDArray[np.int64]) -> float:
        silent = np.zeros(self.shape, dtype=bool)
        silent.flat[np.asarray(heads, dtype=np.int64)] = True
        # Counted by calls and not by module: layers may share one.
        layers = iter(torch.from_numpy(silent))

        def attend(
            _module: nn.Module, tensors: _Tensors, options: dict[str, Any], _mask: KeyMask
        ) -> Tensor:
            out: Tensor = sink_attention(*tensors, **options)
            out[:, next(layers)] = 0.0
            return out

        return _loss(self.model, self.batch, _forward(self.model, self.batch, attend))


def _ablate(
    losses: _Losses, importance: _Array, shares: Sequence[float], one_by_one: int, seed: int
) -> Ablation:
    heads = importance.size
    least = np.argsort(importance, axis=None, kind="stable")
    random = np.random.default_rng(seed).permutation(heads)
    counts = [round(share * heads) for share in shares]
    single = {}
    for head in least[:one_by_one].tolist():
        single[divmod(head, importance.shape[1])] = losses.gain([head])
    return Ablation(
        loss=losses.loss,
        shares=tuple(shares),
        least_important=tuple(losses.gain(least[:count]) for count in counts),
        random=tuple(losses.gain(random[:count]) for count in counts),
        single=single,
    )


def first_token_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: KeyMask,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Mean attention to the first token of each sequence, from one logit per query.

    exp(logit - LSE) needs the logit of the first key alone: [b, h, t] numbers, no S x S tensor.

    Args:
        q: [b, h, t, d].
        k: [b, g, s, d].
        lse: fp32 [b, h, t] over the visible keys, the sink left out.
        mask: the visibility that `lse` was made with.
        sinks: [h] logits that take a part of the attention.
        token_mask: bool [b, t], the queries that count; None is all. Queries that see no key
            never count.

    Returns:
        fp32 [h]; 0 when no query counts.
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    if keys == 0:
        return torch.zeros(heads)
    start = torch.zeros(batch, dtype=torch.int64) if mask.key_start is None else mask.key_start
    first = k[torch.arange(batch), :, start.clamp(max=keys - 1)].float()
    grouped = q.float().reshape(batch, groups, heads // groups, queries, width)
    logit = torch.einsum("bgrtd,bgd->bgrt", grouped, first).flatten(1, 2)
    logit = logit * (width**-0.5 if scale is None else scale)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.float().view(-1, 1))

    position = torch.arange(queries) + keys - queries
    distance = position - start[:, None]
    seen = distance >= 0 if mask.causal else torch.ones_like(distance, dtype=torch.bool)
    if mask.window is not None:
        seen = seen & (distance < mask.window) & (distance > -mask.window)
    counted = (lse[:, 0] > float("-inf")) & (True if token_mask is None else token_mask)
    # At most 1 but for the rounding of two different sums of products.
    attention = (logit - total).exp().clamp(max=1.0)
    attention = attention.where((seen & counted)[:, None], 0.0)
    return attention.sum((0, 2)) / counted.sum().clamp(min=1)


def _ratio(above: _Array, below: _Array) -> _Array:
    # A layer whose gates are all 0 is neither unbalanced nor a division by zero.
    return above / np.where(below > 0, below, 1.0)


def _forward(model: nn.Module, batch: Mapping[str, Any], probe: Callable[..., Tensor]) -> Any:
    with torch.no_grad(), probed(model, probe):
        return model(**batch)


def _loss(model: nn.Module, batch: Mapping[str, Any], output: Any) -> float:
    if batch.get("labels") is not None:
        found = getattr(output, "loss", None)
    else:
        found = _next_token_loss(model, batch, output)
    if found is None:
        raise ValueError(
            f"batch: no loss for {type(model).__name__}, expected labels (or input_ids of a "
            "causal language model); or pass ablation=False"
        )
    if not found.isfinite():
        raise ValueError(
            f"batch: got a loss of {float(found)}, expected a token to predict in some sequence; "
            "or pass ablation=False"
        )
    return float(found)


def _next_token_loss(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor | None:
    logits, ids = getattr(output, "logits", None), batch.get("input_ids")
    generates = getattr(model, "can_generate", lambda: False)()
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if logits is None or ids is None or not generates or encodes:
        return None
    target = ids[:, 1:]
    padding = batch.get("attention_mask")
    if padding is not None:
        # A token after padding has nothing to be predicted from.
        target = target.where((padding[:, 1:] * padding[:, :-1]).bool(), -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten())
