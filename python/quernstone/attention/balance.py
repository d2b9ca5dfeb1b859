"""The head-balance loss: what makes all heads of a layer work alike.

Axes: l layers, h query heads.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SharedHeads = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
"""Per layer the heads that the loss leaves out: bool [l, h], l bool [h], or l lists of indices."""


def head_balance_loss(
    importances: Tensor | Sequence[Tensor],
    *,
    weight: float = 1e-2,
    shared: int = 0,
    skip_layers: int = 0,
    correction: int = 0,
    shared_heads: SharedHeads | None = None,
) -> Tensor:
    """Squared variation of the importance over the heads of each layer, summed over the layers.

        loss = weight * sum_l n_l CV_l^2,  CV_l^2 = Var_l / mean_l^2

    over the n_l = h - `shared` heads of layer l that are left when its `shared` most important
    ones are taken out. With `shared` = 0 this is the loss for training from scratch. A fine-tune
    whose collapsed heads cling to what they know takes some out, or else the other heads only
    inflate their gates. It is 0, with a gradient of 0, where the importances of a layer are equal
    or their mean is 0 (below the smallest normal number). A factor on all of them changes nothing,
    so watch their mean too: gates that all open make CV smaller without any work being shared.

    Axes: l layers, h query heads.

    Args:
        importances: [l, h], or l tensors [h] whose h may differ; fp32 or fp64, of one dtype and
            device. `Aux.importance` of each layer, from the whole batch: the mean of the losses
            of its parts is another number. A NaN makes the loss NaN.
        weight: factor of the loss, 0 or more. The paper fine-tunes with 1e-2; for training from
            scratch it gives none that we know.
        shared: the m most important heads of each layer to leave out, below h. The paper's m is
            not known to us; 0 is its loss for training from scratch.
        skip_layers: leave out the first layers, fewer than l.
        correction: 0 divides the variance by n_l, 1 by n_l - 1. Which of them the paper takes is
            not known to us; 0 is the variance of the heads, which are no sample.
        shared_heads: take these heads out instead of the `shared` most important ones of the
            moment, which may change from step to step. `most_important` makes such sets. It
            covers all l layers, also skipped ones.

    Returns:
        A scalar in the dtype of the importances.

    Raises:
        ValueError: a number out of its range, a wrong shape or dtype, layers of different dtypes
            or devices, `shared` beside `shared_heads`, a layer without a head to balance.
        TypeError: `importances` is no tensor and no sequence of tensors.

    Source: arXiv 2602.01203, the auxiliary loss (m = 0) and the loss with shared heads. Oracle:
    autograd on the formula, gradcheck.
    """
    rows = layers_of(importances)
    check_options(weight, shared, skip_layers, correction, shared_heads)
    if skip_layers >= len(rows):
        raise ValueError(f"skip_layers: got {skip_layers}, expected fewer than {len(rows)} layers")
    x, balanced = _padded(importances, rows)
    if shared_heads is not None:
        left_out = pad_sequence(_masks(shared_heads, rows), batch_first=True)
        balanced = ~left_out if balanced is None else balanced & ~left_out
        full = ~balanced[skip_layers:].any(1)
        if bool(full.any()):
            layer = skip_layers + int(full.long().argmax())
            raise ValueError(f"shared_heads[{layer}]: got every head, expected one to be left")
    elif shared:
        for layer, row in enumerate(rows):
            if layer >= skip_layers and shared >= len(row):
                raise ValueError(
                    f"shared: got {shared}, expected fewer than the {len(row)} heads of "
                    f"layer {layer}"
                )
        left_out = _top(x if balanced is None else x.masked_fill(~balanced, -math.inf), shared)
        balanced = ~left_out if balanced is None else balanced & ~left_out
    if skip_layers:
        x = x[skip_layers:]
        balanced = None if balanced is None else balanced[skip_layers:]
    total = _Variation.apply(x, balanced, correction)  # type: ignore[no-untyped-call]
    return weight * cast(Tensor, total)


def most_important(importances: Tensor | Sequence[Tensor], m: int) -> list[Tensor]:
    """The m most important heads of each layer, for `shared_heads`.

    Args:
        importances: [l, h], or l tensors [h].
        m: heads per layer, from 0 to h.

    Returns:
        l tensors, bool [h], true for the m heads. Of equals the first is taken, and NaN last.

    Raises:
        ValueError, TypeError: as `head_balance_loss`.

    Source: arXiv 2602.01203 (shared heads, after DeepSeekMoE's shared experts).
    """
    rows = layers_of(importances)
    for layer, row in enumerate(rows):
        if not 0 <= m <= len(row):
            raise ValueError(f"m: got {m}, expected 0 to the {len(row)} heads of layer {layer}")
    return [_top(row.unsqueeze(0), m)[0] for row in rows]


def head_variation(importances: Tensor | Sequence[Tensor]) -> Tensor:
    """CV of the importance of the heads of each layer, the imbalance that the paper reports.

    Args:
        importances: [l, h], or l tensors [h].

    Returns:
        [l]: standard deviation over mean of all heads of a layer, 0 where the mean is 0. The
        variance is over h. Not meant to be differentiated: the loss has a root less.

    Raises:
        ValueError, TypeError: as `head_balance_loss`.
    """
    with torch.no_grad():
        rows = layers_of(importances)
        relative, heads, _ = _relative(*_padded(importances, rows))
        return (relative.square().sum(1, keepdim=True) / heads).squeeze(1).sqrt()


def check_options(
    weight: float,
    shared: int,
    skip_layers: int,
    correction: int,
    shared_heads: SharedHeads | None,
) -> None:
    """Refuse what is out of range whatever the importances are."""
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"weight: got {weight}, expected a finite number, 0 or more")
    _at_least_0("shared", shared)
    _at_least_0("skip_layers", skip_layers)
    if correction not in (0, 1):
        raise ValueError(f"correction: got {correction!r}, expected 0 or 1")
    if shared_heads is not None and shared:
        raise ValueError(f"shared: got {shared} beside shared_heads, expected 0")


def layers_of(importances: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The importances of each layer, [h] each, after all checks."""
    if isinstance(importances, Tensor):
        if importances.ndim != 2:
            raise ValueError(
                f"importances.ndim: got {importances.ndim}, expected 2 (layers, heads)"
            )
        rows = list(importances)
    else:
        rows = list(importances)
    if not rows:
        raise ValueError("importances: got no layer, expected one at least")
    for layer, row in enumerate(rows):
        where = f"importances[{layer}]"
        if not isinstance(row, Tensor):
            raise TypeError(f"{where}: got {type(row).__name__}, expected a tensor")
        if row.ndim != 1 or not len(row):
            raise ValueError(f"{where}.shape: got {tuple(row.shape)}, expected (heads,)")
        if row.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{where}.dtype: got {row.dtype}, expected float32 or float64")
        if (row.dtype, row.device) != (rows[0].dtype, rows[0].device):
            raise ValueError(
                f"{where}: got {row.dtype} on {row.device}, expected {rows[0].dtype} on "
                f"{rows[0].device} as in layer 0"
            )
    return rows


def _padded(
    importances: Tensor | Sequence[Tensor], rows: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """[l, largest h], and where layers differ bool of the same shape, true for heads that exist."""
    if isinstance(importances, Tensor):
        return importances, None
    x = pad_sequence(rows, batch_first=True)
    heads = [len(row) for row in rows]
    if min(heads) == x.shape[1]:
        return x, None
    ends = torch.tensor(heads, device=x.device).unsqueeze(1)
    return x, torch.arange(x.shape[1], device=x.device) < ends


class _Variation(torch.autograd.Function):
    """Sum of n CV^2 over the layers. Its gradient is made beside it, in a dozen small operations:
    autograd's own way takes three times as many, beside a short step a cost that shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, balanced: Tensor | None, correction: int) -> Tensor:
        relative, heads, mean = _relative(x, balanced)
        squares = relative.square().sum(1, keepdim=True)
        factor = _factor(heads, correction)
        gradient = (relative - squares / heads) * (2 * factor) / mean
        if balanced is not None:
            gradient = gradient.masked_fill(~balanced, 0.0)
        ctx.correction = correction
        ctx.save_for_backward(x, balanced, gradient)
        return (factor * squares).sum()

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None]:
        x, balanced, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            relative, heads, _mean = _relative(x, balanced)
            squares = relative.square().sum(1, keepdim=True)
            total = (_factor(heads, ctx.correction) * squares).sum()
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        return dtotal * gradient, None, None


def _factor(heads: Tensor | int, correction: int) -> Tensor | float:
    """n over what the squares are divided by."""
    if isinstance(heads, int):
        return heads / max(1, heads - correction)
    return heads / (heads - correction).clamp(min=1)


def _relative(x: Tensor, balanced: Tensor | None) -> tuple[Tensor, Tensor | int, Tensor]:
    """(x - mean) / mean of [l, h], 0 for heads not `balanced`; their number, and the mean.

    Where the mean is 0 both it and the differences are replaced, by 1 and 0.
    """
    if balanced is None:
        heads: Tensor | int = x.shape[1]
        mean = x.mean(1, keepdim=True)
        pivot = x[:, :1].detach()
    else:
        heads = balanced.sum(1, keepdim=True).to(x.dtype)
        mean = x.masked_fill(~balanced, 0.0).sum(1, keepdim=True) / heads
        pivot = x.detach().gather(1, balanced.long().argmax(1, keepdim=True))
    dead = mean.abs() < torch.finfo(x.dtype).tiny
    mean = mean.masked_fill(dead, 1.0)
    # CV does not depend on what is subtracted before the mean of the differences, so the pivot is
    # a constant; equal importances give differences of exactly 0, which x - mean does not.
    deviation = (x - pivot).masked_fill(dead if balanced is None else dead | ~balanced, 0.0)
    # Dividing first keeps the square of a small mean from underflowing.
    relative = deviation / mean
    relative = relative - relative.sum(1, keepdim=True) / heads
    return relative if balanced is None else relative.masked_fill(~balanced, 0.0), heads, mean


def _top(x: Tensor, m: int) -> Tensor:
    """bool [l, h], true for the m largest of each row of x."""
    # A NaN must not hide among the heads that are left out.
    sortable = x.detach().nan_to_num(nan=-math.inf, neginf=-math.inf)
    order = sortable.argsort(stable=True, dim=1, descending=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :m], True)


def _masks(shared_heads: SharedHeads, rows: list[Tensor]) -> list[Tensor]:
    sets = list(shared_heads)
    if len(sets) != len(rows):
        raise ValueError(f"shared_heads: got {len(sets)} layers, expected {len(rows)}")
    masks = []
    for layer, (heads, row) in enumerate(zip(sets, rows, strict=True)):
        where = f"shared_heads[{layer}]"
        if isinstance(heads, Tensor):
            if heads.dtype != torch.bool:
                raise ValueError(f"{where}.dtype: got {heads.dtype}, expected bool")
            if heads.shape != row.shape:
                got, want = tuple(heads.shape), tuple(row.shape)
                raise ValueError(f"{where}.shape: got {got}, expected {want}")
            masks.append(heads.to(row.device))
            continue
        kind = torch.tensor(list(heads)).dtype
        if len(heads) and kind in (torch.bool, torch.float32, torch.float64):
            # A row of a mask would be read as the heads 0 and 1.
            raise ValueError(f"{where}: got a list of {kind}, expected indices or a bool tensor")
        for head in heads:
            if not 0 <= head < len(row):
                raise ValueError(f"{where}: got head {head}, expected 0 to {len(row) - 1}")
        index = torch.tensor(list(heads), dtype=torch.int64, device=row.device)
        masks.append(torch.zeros_like(row, dtype=torch.bool).index_fill(0, index, True))
    return masks


def _at_least_0(name: str, x: int) -> None:
    if x < 0:
        raise ValueError(f"{name}: got {x}, expected 0 or more")
