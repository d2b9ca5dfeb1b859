"""Quantisation-aware fine-tuning towards weights with few ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quernstone.pim.api import hamming_rate
from quernstone.pim.codebook import Codebook
from quernstone.pim.lhr import hamming_regulariser, hamming_regulariser_into, symmetric_scales

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer's weights."""

    name: str
    weights: int
    shift: int
    before: float
    """HR of the nearest codes of the weights that came, not shifted."""
    start: float
    """HR of the stored codes before the first step."""
    after: float
    """HR of the stored codes now."""
    clipped: float
    """Share of the stored codes that are the smallest or the largest."""
    codes: Tensor
    """int16, as stored: with the shift; weight = (code - shift) x scale."""
    scales: Tensor
    """[n, 1] fp32."""


@dataclass(frozen=True)
class FitReport:
    """Layer by layer what `fit` did, and the losses on the way."""

    bits: int
    layers: tuple[LayerFit, ...]
    losses: tuple[float, ...]
    """The caller's loss of each step, without the regulariser."""

    def _mean(self, which: str) -> float:
        total = sum(layer.weights for layer in self.layers)
        ones: float = sum(getattr(layer, which) * layer.weights for layer in self.layers)
        return ones / total

    @property
    def before(self) -> float:
        """HR over all layers, as `LayerFit.before`."""
        return self._mean("before")

    @property
    def after(self) -> float:
        """HR over all layers, as `LayerFit.after`."""
        return self._mean("after")

    @property
    def cut(self) -> float:
        """Share of the ones that are gone."""
        return 1 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}} {'weights':>9} shift  before   start   after clipped"]
        lines += [
            f"{x.name:{width}} {x.weights:9} {x.shift:5} {x.before:7.4f} {x.start:7.4f} "
            f"{x.after:7.4f} {x.clipped:7.2%}"
            for x in self.layers
        ]
        total = sum(x.weights for x in self.layers)
        lines.append(
            f"{'all':{width}} {total:9} {'':5} {self.before:7.4f} {self._mean('start'):7.4f} "
            f"{self.after:7.4f} {self._mean('clipped'):7.2%}"
        )
        return "\n".join(lines)


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    ratio: float | Mapping[str, float] = 1e-3,
    shift: int | Mapping[str, int] = 0,
    price: float | Mapping[str, float] = 0.0,
    bits: int = 8,
    layers: Iterable[str] | None = None,
    optimizer: Optimizer | None = None,
    warmup: int = 0,
    seed: int = 0,
) -> FitReport:
    """Fine-tunes a module so that its quantised weights have few ones, and leaves those in it.

        loss(step) + sum over layers of ratio x (mean interpolated Hamming weight)^2

    The module computes with integers throughout: each chosen weight is rounded on its way in, and
    its gradient goes straight through to the real weight, on which the regulariser acts. The
    learning rate rises over `warmup` steps and then falls to 0 along a cosine.

    Args:
        module: changed in place; afterwards its weights are (code - shift) x scale, and
            `requires_grad` is as before. Its scales are those of the weights that came, one an
            output channel.
        loss: called with 0, 1, ... `steps` - 1 inside; calls the module and gives a scalar.
        steps: 0 rounds only.
        ratio: lambda of the regulariser, 0 or more; for all layers or by name.
        shift: see `mean_hamming_weight`; for all layers or by name.
        price: what a one costs when a weight is rounded, in squared steps of the scale
            (`Codebook`); 0 rounds to the nearest code. For all layers or by name.
        bits: of a code, 2 to 16.
        layers: names of submodules with an fp32 `weight`; None: all linear and convolutional ones.
        optimizer: makes one for the parameters that require gradients; None: Adam, rate 1e-4.
        seed: of torch's generator from here on; the caller's own state comes back at the end.

    Returns:
        HR of each layer before and after, codes and scales, and the losses.

    Raises:
        ValueError, TypeError: an argument is not as described; a layer is shared, has been
            parametrised before or is unknown, its weights are not finite; a loss is not a finite
            scalar with a gradient, named by its step. The module then has the parameters and
            buffers that it came with.

    Source: AIM (arXiv 2511.04321), our reading: regulariser, straight-through rounding, cosine
    schedule. Rounding at a price in the forward pass is ours.
    """
    _check_count("steps", steps)
    _check_count("warmup", warmup)
    chosen = _chosen(module, layers)
    plans = {
        name: _Plan(
            name,
            layer,
            bits,
            _for_layer("shift", shift, name, chosen),
            _for_layer("ratio", ratio, name, chosen),
            _for_layer("price", price, name, chosen),
        )
        for name, layer in chosen.items()
    }
    kept = [(x, x.detach().clone()) for x in (*module.parameters(), *module.buffers())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for plan in plans.values():
            plan.begin()
        try:
            losses = _train(module, loss, list(plans.values()), steps, optimizer, warmup)
        except BaseException:
            for plan in plans.values():
                plan.undo()
            with torch.no_grad():
                for x, before in kept:
                    x.copy_(before)
            raise
        return FitReport(bits, tuple(plan.end() for plan in plans.values()), losses)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, codebook: Codebook) -> Tensor:
        return codebook.round(weight / scale).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Rounded(nn.Module):
    """The parametrisation: what the layer computes with, of the weight that is trained."""

    scale: Tensor

    def __init__(self, scale: Tensor, codebook: Codebook) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.codebook = codebook

    def forward(self, weight: Tensor) -> Tensor:
        made: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            weight, self.scale, self.codebook
        )
        return made


class _Plan:
    """One layer on its way."""

    def __init__(
        self, name: str, layer: nn.Module, bits: int, shift: int, ratio: float, price: float
    ) -> None:
        if not 0 <= ratio < math.inf:
            raise ValueError(f"ratio of {name!r}: got {ratio}, expected 0 or more, finite")
        self.name, self.layer, self.bits, self.shift, self.ratio = name, layer, bits, shift, ratio
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.first = weight.detach().clone()
        try:
            self.scales = symmetric_scales(weight, bits=bits)
            self.codebook = Codebook.of(bits, shift, price)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        self.scale = self.scales.reshape(-1, *(1,) * (weight.ndim - 1))
        self.order = list(layer._parameters)
        self.start = 0.0

    @property
    def weight(self) -> nn.Parameter:
        """The real weight."""
        listed: Any = self.layer.parametrizations
        return listed.weight.original  # type: ignore[no-any-return]

    def stored(self, weight: Tensor) -> Tensor:
        return self.codebook.round(weight / self.scale).add_(self.shift).short()

    def rate(self, codes: Tensor) -> float:
        return hamming_rate(codes, self.bits)

    def begin(self) -> None:
        parametrize.register_parametrization(
            self.layer, "weight", _Rounded(self.scale, self.codebook), unsafe=True
        )
        self.start = self.rate(self.stored(self.first))

    def regularise(self) -> None:
        if not self.ratio:
            return
        weight = self.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if not (weight.is_contiguous() and weight.grad.is_contiguous() and weight.is_cpu):
            leaf = weight.detach().requires_grad_()
            value = hamming_regulariser(leaf, self.scales, bits=self.bits, shift=self.shift)
            weight.grad.add_(torch.autograd.grad(value, leaf)[0], alpha=self.ratio)
            return
        hamming_regulariser_into(
            weight.detach(),
            self.scales,
            weight.grad,
            factor=self.ratio,
            bits=self.bits,
            shift=self.shift,
        )

    def end(self) -> LayerFit:
        codes = self.stored(self.weight.detach())
        self._leave((codes.float() - self.shift) * self.scale)
        nearest = Codebook.of(self.bits).round(self.first / self.scale).short()
        edges = (codes == codes.new_tensor(-(1 << (self.bits - 1)))) | (
            codes == (1 << (self.bits - 1)) - 1
        )
        return LayerFit(
            self.name,
            codes.numel(),
            self.shift,
            self.rate(nearest),
            self.start,
            self.rate(codes),
            float(edges.float().mean()),
            codes,
            self.scales,
        )

    def undo(self) -> None:
        self._leave(self.first)

    def _leave(self, weight: Tensor) -> None:
        parameter = self.weight
        parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            parameter.copy_(weight)
        own = self.layer._parameters
        for name in self.order:  # as they came: optimisers know parameters by their place
            own[name] = own.pop(name)


def _train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    plans: list[_Plan],
    steps: int,
    optimizer: Optimizer | None,
    warmup: int,
) -> tuple[float, ...]:
    trained = [p for p in module.parameters() if p.requires_grad]
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-4))
    chooser = make(trained)
    if not isinstance(chooser, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: got {type(chooser).__name__}, expected it to make an Optimizer"
        )
    rates = [group["lr"] for group in chooser.param_groups]
    losses = []
    for step in range(steps):
        share = _schedule(step, steps, warmup)
        for group, rate in zip(chooser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        chooser.zero_grad()
        value = loss(step)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss({step}): got {type(value).__name__}, expected a scalar Tensor")
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"loss({step}): got {losses[-1]}, expected a finite number")
        if not value.requires_grad:
            raise ValueError(f"loss({step}): got no gradient, expected a loss of the parameters")
        value.backward()
        for plan in plans:
            plan.regularise()
        chooser.step()
    return tuple(losses)


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected 0 or more")


def _for_layer(what: str, value: Any, name: str, chosen: Mapping[str, nn.Module]) -> Any:
    if not isinstance(value, Mapping):
        return value
    strange = [key for key in value if key not in chosen]
    if strange:
        raise ValueError(f"{what}: got layer {strange[0]!r}, expected one of {list(chosen)}")
    if name not in value:
        raise ValueError(f"{what}: got none for layer {name!r}, expected one for each layer")
    return value[name]


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _chosen(module: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
    if isinstance(layers, str):
        raise TypeError(f"layers: got the string {layers!r}, expected names")
    known = dict(module.named_modules())
    if layers is None:
        names = [name for name, layer in known.items() if isinstance(layer, _KINDS)]
    else:
        names = list(layers)
    if not names:
        raise ValueError("layers: got none, expected at least one")
    found: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"layers: got {name!r}, expected a submodule's name")
        layer = known[name]
        weight = getattr(layer, "weight", None)
        if parametrize.is_parametrized(layer):
            raise ValueError(f"layer {name!r}: got a parametrised weight, expected a plain one")
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"layer {name!r}: got no floating weight, expected one")
        if weight.dtype != torch.float32:
            raise TypeError(f"layer {name!r}: got a weight of {weight.dtype}, expected float32")
        if not weight.requires_grad:
            raise ValueError(f"layer {name!r}: got a frozen weight, expected one that is trained")
        if id(weight) in seen:
            raise ValueError(
                f"layer {name!r}: got the weight of {seen[id(weight)]!r}, expected its own"
            )
        seen[id(weight)] = name
        found[name] = layer
    return found
