"""What the routers of a model choose: recorded as a trace, predicted a few layers ahead.

Works on any model whose mixture-of-experts blocks have a `gate` that returns (logits, weights,
ids) and `experts` that take (hidden states, ids, weights): those of transformers (Mixtral,
Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and V3).

Axes: l mixture-of-experts layers, t tokens, k experts of a token, e experts, d distance in layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quernstone.moe.trace import Trace

Run = Callable[[Any], Any]
"""run(batch): has the model compute a batch; what it returns is not looked at."""


@dataclass(frozen=True)
class MoeBlock:
    """A mixture-of-experts block of a model."""

    name: str
    """As in `model.named_modules()`."""
    module: nn.Module
    router: nn.Module
    """Returns (logits [t, e], weights [t, k], ids [t, k])."""
    experts: nn.Module
    """Takes (hidden states [t, m], ids [t, k], weights [t, k])."""


def moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """The mixture-of-experts blocks of a model in the order of its layers.

    Raises:
        ValueError: it has none.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "gate" in children and "experts" in children:
            found.append(MoeBlock(name, module, children["gate"], children["experts"]))
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__} without a module that has `gate` and `experts`, "
            "expected a mixture of experts"
        )
    return found


def record_routing(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run,
    *,
    step_tokens: int | None = 1,
    scores: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> Trace:
    """Runs a model and writes down what its routers choose.

    Args:
        model: see the top of this module; all its blocks have the same number of experts.
        batches: what `run` takes, one after the other.
        run: has the model compute a batch.
        step_tokens: tokens of a step of the trace: 1 for decoding; None makes each batch a step,
            as a prompt is.
        scores: whether the softmax of the routers is kept, as fp16.
        meta: what made the trace.

    Raises:
        ValueError: no batch; blocks that differ in their experts; a router whose logits are not
            finite; `step_tokens` below 1.
    """
    if step_tokens is not None and step_tokens < 1:
        raise ValueError(f"step_tokens: got {step_tokens}, expected 1 or more, or None")
    blocks = moe_blocks(model)
    ids: list[list[NDArray[np.int16]]] = [[] for _ in blocks]
    softmax: list[list[NDArray[np.float16]]] = [[] for _ in blocks]

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            logits, weights, chosen = routed(blocks[layer].name, output)
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(f"{blocks[layer].name}.gate: got logits that are not finite")
            # The most important first, which not all routers promise.
            order = weights.argsort(dim=1, descending=True, stable=True)
            ids[layer].append(chosen.gather(1, order).to(torch.int16).cpu().numpy())
            if scores:
                softmax[layer].append(logits.float().softmax(-1).half().cpu().numpy())

        return hook

    steps: list[NDArray[np.int32]] = []
    with _watching(model, {block.router: watch(i) for i, block in enumerate(blocks)}):
        for batch in batches:
            before = len(ids[0])
            run(batch)
            if any(len(layer) != before + 1 for layer in ids):
                raise ValueError("run: expected each router to run once a batch")
            count = len(ids[0][-1])
            size = count if step_tokens is None else step_tokens
            begin = int(steps[-1][-1]) + 1 if steps and len(steps[-1]) else 0
            steps.append(begin + np.arange(count, dtype=np.int32) // max(1, size))
    if not steps:
        raise ValueError("batches: got none, expected one at least")
    experts = {_experts_of(block) for block in blocks}
    if len(experts) > 1:
        raise ValueError(f"model: got layers of {sorted(experts)} experts, expected one number")
    return Trace(
        experts.pop(),
        np.stack([np.concatenate(layer) for layer in ids]),
        np.concatenate(steps).astype(np.int32),
        np.stack([np.concatenate(layer) for layer in softmax]) if scores else None,
        dict(meta or {}),
    )


def prediction_accuracy(
    model: nn.Module, batches: Iterable[Any], run: Run, *, distance: int = 3
) -> NDArray[np.float64]:
    """How often the router of a later layer is right about its experts, asked too early.

    The router of layer l + d is given the input of layer l; its k choices are compared with those
    that it makes in its own turn.

    Args:
        model: see the top of this module.
        batches: what `run` takes.
        run: has the model compute a batch.
        distance: the largest d, 1 or more.

    Returns:
        [l, d]: of the experts predicted for layer l, d + 1 layers before, the share that was used;
        NaN where there is no such earlier layer.

    Raises:
        ValueError: no batch; a distance below 1.

    Source: AdapMoE, arXiv 2408.10284 (the next layer); HybriMoE, arXiv 2504.05897 (three layers).
    """
    if distance < 1:
        raise ValueError(f"distance: got {distance}, expected 1 or more")
    blocks = moe_blocks(model)
    right = np.zeros((len(blocks), distance))
    asked = np.zeros((len(blocks), distance))
    inputs: list[Tensor | None] = [None] * len(blocks)
    asking = False

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, given: Any, output: Any) -> None:
            nonlocal asking
            if asking:
                return
            inputs[layer] = given[0].detach()
            _, _, chosen = routed(blocks[layer].name, output)
            asking = True
            try:
                for d in range(1, distance + 1):
                    early = inputs[layer - d] if layer >= d else None
                    if early is None:
                        continue
                    guess = routed(blocks[layer].name, blocks[layer].router(early))[2]
                    hits = (guess[:, :, None] == chosen[:, None, :]).any(-1)
                    right[layer, d - 1] += float(hits.sum())
                    asked[layer, d - 1] += hits.numel()
            finally:
                asking = False

        return hook

    count = 0
    with _watching(model, {block.router: watch(i) for i, block in enumerate(blocks)}):
        for batch in batches:
            inputs = [None] * len(blocks)
            run(batch)
            count += 1
    if not count:
        raise ValueError("batches: got none, expected one at least")
    return np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)


def routed(name: str, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [t, e], weights [t, k] and ids [t, k] that a router returned.

    Raises:
        TypeError: it returned something else.
    """
    if not isinstance(output, tuple) or len(output) != 3:
        raise TypeError(
            f"{name}.gate: got {type(output).__name__}, expected (logits, weights, ids)"
        )
    logits, weights, ids = (x.detach() if isinstance(x, Tensor) else x for x in output)
    if not all(isinstance(x, Tensor) for x in (logits, weights, ids)):
        raise TypeError(f"{name}.gate: got no tensors, expected (logits, weights, ids)")
    flat = logits.reshape(-1, logits.shape[-1])
    rows = len(flat)
    return flat, weights.reshape(rows, -1), ids.reshape(rows, -1)


def _experts_of(block: MoeBlock) -> int:
    weight = getattr(block.router, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{block.name}.gate: got no weight, expected one row for each expert")
    return int(weight.shape[0])


@contextmanager
def _watching(model: nn.Module, hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Hooks that are gone afterwards, no gradients, evaluation mode."""
    training = model.training
    with ExitStack() as stack, torch.no_grad():
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        stack.callback(model.train, training)
        model.eval()
        yield
