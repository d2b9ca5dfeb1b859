"""Layers of experts that run: on the CPU alone, or by a schedule on the CPU and a device.

Axes: t tokens, c choices of a token, e experts, m hidden width, l layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, get_args

from torch import Tensor, nn

from quernstone.moe.cache.base import whole
from quernstone.moe.cache.policies import Policy as CachePolicy
from quernstone.moe.cache.policies import check_policy
from quernstone.moe.cost import CostModel
from quernstone.moe.devices import Device
from quernstone.moe.experts import Experts
from quernstone.moe.schedule import MAX_DISTANCE, Policy

Router = Callable[[Tensor], Tensor]
"""[t, m] hidden states to [t, e] scores, a softmax over all experts of the layer."""


class Runtime:
    """The layers of experts of a model, and where they are computed.

    Outputs depend neither on the schedule, nor on the cache, nor on prefetching: a token's experts
    are summed in the order of their numbers wherever each was computed. Between devices of
    different arithmetic they differ by its rounding, unless `reproducible`.

    Args:
        layers: experts by the name of their layer, in the order in which a model calls them.
        device: what computes beside the CPU; None: nothing does.
        costs: of an expert; None asks the device.
        policy: of the schedule.
        cache: which experts stay on the device.
        slots: of each layer on the device, one number for all or one each; None is a quarter of
            the experts.
        prefetch: layers ahead whose experts are moved while the bus is idle, 0 to 3.
        reproducible: int8 and int4 experts alone: the arithmetic of csrc/moe/README.md, bit for bit
            the same on every processor and device.

    Raises:
        ValueError: no layer, a value out of its range, bf16 experts with `reproducible`.
        TypeError: a value of another type.
    """

    def __init__(
        self,
        layers: Mapping[str, Experts],
        device: Device | None = None,
        *,
        costs: CostModel | None = None,
        policy: Policy = "hybrid",
        cache: CachePolicy = "reuse",
        slots: int | Sequence[int] | None = None,
        prefetch: int = 0,
        reproducible: bool = False,
    ) -> None:
        if not layers:
            raise ValueError("layers: got none, expected one at least")
        given: Mapping[str, Any] = layers
        for name, experts in given.items():
            if not isinstance(experts, Experts):
                got = type(experts).__name__
                raise TypeError(f"layers[{name!r}]: got {got}, expected Experts")
            if reproducible and experts.shape.format == "bf16":
                raise ValueError(
                    f"layers[{name!r}]: got 'bf16', expected int8 or int4 with reproducible"
                )
        if policy not in get_args(Policy):
            raise ValueError(f"policy: got {policy!r}, expected one of {get_args(Policy)}")
        check_policy(cache)
        if not 0 <= whole("prefetch", prefetch) <= MAX_DISTANCE:
            raise ValueError(f"prefetch: got {prefetch}, expected 0 to {MAX_DISTANCE}")
        self.device = device
        self.reproducible = reproducible
        self._experts = dict(layers)
        self._modules = {name: HybridMoE(self._experts[name]) for name in layers}

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._experts)

    def layer(self, name: str) -> HybridMoE:
        """The module of a layer.

        Raises:
            ValueError: there is no such layer.
        """
        if name not in self._modules:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(self._modules)}")
        return self._modules[name]

    def set_router(self, name: str, router: Router) -> None:
        """Tells the router of a layer: prefetching asks it about hidden states of earlier ones."""
        self.layer(name)

    def close(self) -> None:
        """Ends the workers and gives the device back; may be called twice."""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


class HybridMoE(nn.Module):
    """The experts of one layer, without parameters; `Runtime.layer` gives those of a runtime.

    Args:
        experts: computed on the CPU.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        if not isinstance(experts, Experts):
            raise TypeError(f"experts: got {type(experts).__name__}, expected Experts")
        self.experts = experts

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [t, m] fp32 or bf16.
            ids: [t, c] int64, the experts of a token, none twice; -1 is none.
            weights: [t, c] fp32, what each counts, finite.
            scores: [t, e] the router's softmax, for caches that go by it.

        Returns:
            [t, m] in the dtype and on the device of x.

        Raises:
            ValueError, TypeError: as `Experts`.
        """
        return self.experts(x, ids, weights)
