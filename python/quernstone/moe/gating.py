"""Fewer experts for tokens that will not miss them.

Axes: t tokens, k experts of a token, l mixture-of-experts layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quernstone.moe.routing import moe_blocks, routed
from quernstone.sensitivity import Loss, output_fisher


def drop_experts(
    ids: Tensor, weights: Tensor, sensitivity: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Drops the least of a token's experts while the loss is expected to hardly notice.

    With the experts by falling weight, dropping those behind place j takes the share

        tau_j = sum_{i > j} w_i / sum_i w_i

    of the mixture away, which moves the output by about tau_j times the distance of two experts.
    To second order the loss then rises by tau_j^2 F times a constant, F being the mean squared
    gradient of the layer's output. The smallest j >= 1 with

        tau_j^2 F <= threshold

    is taken, and what is kept is scaled up so that the weights keep their sum. For two experts of
    weights a and 1 - a this is AdapMoE's rule, (1 - a)^2 F <= T.

    Args:
        ids: [t, k] int64.
        weights: [t, k] of any floating type, not negative.
        sensitivity: F of the layer, 0 or more.
        threshold: T, 0 or more; 0 drops nothing that has a weight.

    Returns:
        ids [t, k] with -1 where dropped, and weights [t, k], 0 there, in the places they came in.

    Raises:
        ValueError: shapes that disagree, a weight that is negative or not finite, a sensitivity or
            threshold out of its range.

    Source: AdapMoE, arXiv 2408.10284, section on sensitivity-based gating (k = 2); its
    generalisation to any k is this project's own.
    """
    for name, value in (("sensitivity", sensitivity), ("threshold", threshold)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}, expected 0 or more and finite")
    if ids.shape != weights.shape or ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(
            f"weights.shape: got {tuple(weights.shape)} beside ids {tuple(ids.shape)}, expected "
            "[t, k] both, k 1 or more"
        )
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError("weights: got a number that is negative or not finite, expected none")
    place, kept = _kept(weights, sensitivity, threshold)
    keep = place < kept[:, None]
    wide = weights.double()
    left = torch.where(keep, wide, 0.0)
    scale = wide.sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp_min(1e-300)
    return torch.where(keep, ids, -1), (left * scale).to(weights.dtype)


def tail_shares(weights: Tensor) -> Tensor:
    """[t, k - 1] fp64: tau_j of keeping j = 1 .. k - 1 experts, see `drop_experts`."""
    ordered = weights.double().sort(dim=1, descending=True).values
    total = ordered.sum(1, keepdim=True).clamp_min(1e-300)
    # Summed from the smallest, so that a small tail keeps its digits.
    tails = ordered.flip(1).cumsum(1).flip(1) / total
    return tails[:, 1:]


def _kept(weights: Tensor, sensitivity: float, threshold: float) -> tuple[Tensor, Tensor]:
    """[t, k] place of each expert by falling weight, and [t] how many stay."""
    order = weights.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    columns = torch.arange(weights.shape[1], device=weights.device).expand_as(order)
    place.scatter_(1, order, columns)
    # tau falls with j: those that must stay are the first ones whose tail weighs too much.
    heavy = tail_shares(weights).square() * sensitivity > threshold
    return place, 1 + heavy.sum(1)


class GatingUse(NamedTuple):
    """What a gate did to the tokens that it saw."""

    single: float
    """Share of tokens and layers with one expert."""
    active: float
    """Mean number of experts of a token in a layer."""


@dataclass
class AdaptiveGating:
    """Drops experts in a model's mixture-of-experts layers while it is switched on.

    Dropped experts keep their place with weight 0, so that any implementation of the experts gives
    the right result; `quernstone.moe.Experts` skips them.

    Args:
        sensitivity: F of each block by its name, see `layer_sensitivity`.
        threshold: T, see `drop_experts`.
    """

    sensitivity: Mapping[str, float]
    threshold: float
    _counts: list[int] = field(default_factory=lambda: [0, 0, 0], repr=False)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within this block the model's routers drop experts.

        Raises:
            ValueError: a block of the model has no sensitivity.
        """
        with ExitStack() as stack:
            for block in moe_blocks(model):
                if block.name not in self.sensitivity:
                    raise ValueError(f"sensitivity: got none for {block.name!r}, expected one")
                hook = self._hook(block.name)
                stack.callback(block.router.register_forward_hook(hook).remove)
            yield

    def drop(self, name: str, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`drop_experts` of a block by its name; what it does to the tokens is counted.

        Raises:
            ValueError: the block has no sensitivity; as `drop_experts`.
        """
        if name not in self.sensitivity:
            raise ValueError(f"sensitivity: got none for {name!r}, expected one")
        kept, scaled = drop_experts(ids, weights, self.sensitivity[name], self.threshold)
        active = (kept >= 0).sum(1)
        self.count(len(active), int((active == 1).sum()), int(active.sum()))
        return kept, scaled

    def count(self, tokens: int, single: int, active: int) -> None:
        """Adds tokens of a layer to what `use` tells.

        Args:
            tokens: how many.
            single: how many of them have one expert.
            active: the experts of all of them.
        """
        self._counts[0] += tokens
        self._counts[1] += single
        self._counts[2] += active

    def use(self) -> GatingUse:
        """Of the tokens since the last call.

        Raises:
            ValueError: there was none.
        """
        rows, single, active = self._counts
        if not rows:
            raise ValueError("use: got no token, expected a model to have run within `on`")
        self._counts[:] = [0, 0, 0]
        return GatingUse(single / rows, active / rows)

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            _, weights, ids = routed(name, output)
            _, scaled = self.drop(name, ids, weights)
            return output[0], scaled.view_as(output[1]), output[2]

        return hook


def layer_sensitivity(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, float]:
    """F of each mixture-of-experts block: mean squared gradient of the loss of a token's output.

    Args:
        model: see `quernstone.moe.routing`.
        batches, loss: as `quernstone.sensitivity.output_fisher` takes them.

    Source: AdapMoE, arXiv 2408.10284. Oracle: the Hessian by `torch.func`, in the tests of
    `output_fisher`.
    """
    return output_fisher(model, [block.name for block in moe_blocks(model)], batches, loss)


class Searched(NamedTuple):
    """The outcome of a search for a threshold."""

    threshold: float
    """The largest that is within the tolerance, as are all smaller ones that were tried."""
    loss: float
    base: float
    """The loss without dropping."""
    tried: tuple[tuple[float, float], ...]
    """(threshold, loss) by rising threshold."""


def threshold_candidates(
    weights: Sequence[Tensor], sensitivity: Sequence[float], count: int = 20
) -> list[float]:
    """Thresholds between which equal shares of the activated experts are dropped.

    All but the first expert of a token count: with two experts, equal shares of the tokens turn to
    a single one.

    Args:
        weights: of each layer [t, k], k 2 or more.
        sensitivity: F of each layer.
        count: of the thresholds, 1 or more; the last drops nearly all.

    Raises:
        ValueError: no layer, numbers of layers that differ, a count below 1; a sensitivity that is
            negative or not finite; weights that are not finite, or leave no expert to drop.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected 1 or more")
    if not weights or len(weights) != len(sensitivity):
        raise ValueError(
            f"sensitivity: got {len(sensitivity)} for {len(weights)} layers, expected as many, 1 "
            "or more"
        )
    for value in sensitivity:
        if not 0.0 <= value < math.inf:
            raise ValueError(f"sensitivity: got {value}, expected 0 or more and finite")
    needed = torch.cat(
        [tail_shares(w).square().flatten() * f for w, f in zip(weights, sensitivity, strict=True)]
    )
    if not needed.numel() or not bool(torch.isfinite(needed).all()):
        got = "numbers that are not finite" if needed.numel() else "no expert but first ones"
        raise ValueError(f"weights: got {got}, expected finite [t, k], k 2 or more")
    shares = (np.arange(count) + 1) / (count + 1)
    found = np.quantile(needed.cpu().numpy(), shares)
    return [float(x) for x in np.unique(found)]


def search_threshold(
    loss: Callable[[float], float], candidates: Iterable[float], *, tolerance: float
) -> Searched:
    """The largest threshold that costs no more than a tolerance of validation loss.

    Args:
        loss: loss(T) of a model that drops experts at T, on validation data; loss(0.0) is the
            loss of the model as it is.
        candidates: thresholds to try.
        tolerance: relative rise of the loss that is let pass, 0 or more.

    Raises:
        ValueError: a tolerance or candidate out of its range, a loss that is not finite.
    """
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: got {tolerance}, expected 0 or more and finite")
    base = _finite(loss(0.0))
    best, best_loss, failed = 0.0, base, False
    tried = [(0.0, base)]
    for threshold in sorted(candidates):
        if not 0.0 <= threshold < math.inf:
            raise ValueError(f"candidates: got {threshold}, expected 0 or more and finite")
        value = _finite(loss(threshold))
        tried.append((threshold, value))
        failed = failed or value > base + tolerance * abs(base)
        if not failed:
            best, best_loss = threshold, value
    return Searched(best, best_loss, base, tuple(tried))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"loss: got {value}, expected a finite number")
    return value
