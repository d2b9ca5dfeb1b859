"""Layers of experts that run: on the CPU alone, or by a schedule on the CPU and a device.

Axes: t tokens, c choices of a token, e experts, m hidden width, l layers.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quernstone import _core
from quernstone.moe.cache.base import whole
from quernstone.moe.cache.policies import Policy as CachePolicy
from quernstone.moe.cache.policies import check_policy
from quernstone.moe.cost import CostModel, Curve
from quernstone.moe.devices import Device, EmulatedDevice, Work
from quernstone.moe.experts import Experts
from quernstone.moe.recording import Recording
from quernstone.moe.schedule import MAX_DISTANCE, Policy
from quernstone.moe.torch_op import bind_experts, step_of_runtime

Router = Callable[[Tensor], Tensor]
"""[t, m] fp32 hidden states to [t, e] scores, of which the largest choose: logits or a softmax."""
FEW = 4
"""Tokens for which the core's products with a router are sooner done than torch is called."""
STAGING = 4
"""Slots of a device for experts that are moved and not kept."""


class Runtime:
    """The layers of experts of a model, and where they are computed.

    Outputs depend neither on the schedule, nor on the cache, nor on prefetching: a token's experts
    are summed in the order of their numbers wherever each was computed. Between devices of
    different arithmetic they differ by its rounding, unless `reproducible`. An expert goes to one
    device with all its tokens of a call, so this holds for those that compute as "mixed" too.

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
        _check_layers(layers, reproducible)
        if policy not in get_args(Policy):
            raise ValueError(f"policy: got {policy!r}, expected one of {get_args(Policy)}")
        check_policy(cache)
        if cache == "belady":
            raise ValueError("cache: got 'belady', expected a policy that does not know the future")
        if not 0 <= whole("prefetch", prefetch) <= MAX_DISTANCE:
            raise ValueError(f"prefetch: got {prefetch}, expected 0 to {MAX_DISTANCE}")
        check_device(device, costs)
        self.device = device
        self._experts = list(layers.values())
        self._modules = {
            name: HybridMoE(of, _Place(self, i)) for i, (name, of) in enumerate(layers.items())
        }
        self._routers: dict[int, Router] = {}
        self._other_routers: set[int] = set()
        """Layers whose router is no matrix."""
        self._prefetch = prefetch
        self._slots = _slots(slots, self._experts)
        self._core: _core.moe.Runtime | None = None
        self._steps: list[_core.moe.Step] = []
        """Where a step is one call of an operator instead of many."""
        self._lock = threading.Lock()
        self._recording: Recording | None = None
        self._closed = False
        self._given_up = False
        self._computes = [of.compute for of in self._experts]
        self._layouts = [of.shape.layout() for of in self._experts]
        if device is None:
            return
        if len(set(self._computes)) > 1:
            got = " and ".join(sorted(set(self._computes)))
            raise ValueError(f"layers: got some that compute as {got}, expected one")
        device.open(self._experts, self._slots, STAGING, reproducible=reproducible)
        try:
            used = costs or device.costs(self._experts[0].shape)
            self._paced = device.emulated
            self._core = _planner(used, device, self._experts, self._slots, policy, cache)
            if isinstance(device, EmulatedDevice) and device.core is not None:
                self._core.look_so_far(prefetch)
                self._steps = [
                    _core.moe.Step(self._core, device.core, layer, layout, of.data, of.compute)
                    for layer, (layout, of) in enumerate(
                        zip(self._layouts, self._experts, strict=True)
                    )
                ]
            for layer, count in enumerate(self._slots):
                self._bring(layer, range(count))
        except BaseException:
            device.close()
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._modules)

    @property
    def slots(self) -> tuple[int, ...]:
        """Of each layer on the device."""
        return tuple(self._slots) if self.device is not None else (0,) * len(self._slots)

    def layer(self, name: str) -> HybridMoE:
        """The module of a layer.

        Raises:
            ValueError: there is no such layer.
        """
        if name not in self._modules:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(self._modules)}")
        return self._modules[name]

    def set_router(self, name: str, router: Router | Tensor) -> None:
        """Tells the router of a layer: prefetching asks it about hidden states of earlier ones.

        Args:
            name: of the layer.
            router: a function, or the matrix [e, m] of a linear one, which is copied and costs
                least; experts that it has no row for are always chosen.

        Raises:
            ValueError: there is no such layer; a matrix that does not fit it.
            TypeError: a router that is neither.
        """
        place = self.layer(name).place
        assert place is not None
        layer, matrix = place.layer, None
        shape = self._experts[layer].shape
        if isinstance(router, Tensor):
            if router.ndim != 2 or not 1 <= len(router) <= shape.count:
                raise ValueError(
                    f"router.shape: got {tuple(router.shape)}, expected [1 to {shape.count}, "
                    f"{shape.hidden}]"
                )
            if router.shape[1] != shape.hidden:
                raise ValueError(f"router.shape[1]: got {router.shape[1]}, expected {shape.hidden}")
            matrix = router.detach().float().cpu().contiguous().clone()
            router = _linear(matrix, shape.count)
        elif not callable(router):
            raise TypeError(f"router: got {type(router).__name__}, expected a callable or a Tensor")
        with self._lock:
            self._routers[layer] = router
            self._other_routers.discard(layer)
            if matrix is None:
                self._other_routers.add(layer)
            if self._core is not None:
                self._core.set_router(layer, None if matrix is None else matrix.numpy())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def resident(self, name: str) -> list[int]:
        """Experts of a layer that are on the device, or on their way."""
        place = self.layer(name).place
        assert place is not None
        with self._lock:
            return [] if self._core is None else self._core.resident(place.layer)

    def place(self, name: str, experts: Iterable[int]) -> None:
        """Has just these experts of a layer on the device.

        Raises:
            ValueError: more than the layer has slots, or one that it does not have.
        """
        place = self.layer(name).place
        assert place is not None
        wanted = [whole("experts", expert) for expert in experts]
        count = self._experts[place.layer].shape.count
        for expert in wanted:
            if expert >= count:
                raise ValueError(f"experts: got {expert}, expected 0 to {count - 1}")
        if len(set(wanted)) > self.slots[place.layer]:
            raise ValueError(
                f"experts: got {len(set(wanted))}, expected at most {self.slots[place.layer]}, "
                "the layer's slots"
            )
        with self._lock:
            if self._core is not None and self.device is not None:
                if self._given_up:
                    self._recover(self._core, self.device)
                self._given_up = True  # until all of it is on its way
                self._core.clear(place.layer)
                self._bring(place.layer, wanted)
                self._given_up = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Records what is done within, and what was predicted. Without a device, nothing is."""
        recording = Recording(self.device, tuple(self._modules))
        if self.device is not None:
            self.device.times()  # what was before
        self._recording = recording
        try:
            yield recording
        finally:
            self._recording = None
            if self.device is not None and not self._closed:
                recording.real += self.device.times()

    def close(self) -> None:
        """Ends the workers and gives the device back; may be called twice."""
        with self._lock:
            self._closed = True
            self._core = None
            self._steps = []
            if self.device is not None:
                self.device.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _bring(self, layer: int, experts: Iterable[int]) -> None:
        core, device = self._opened()
        with device.untimed() if isinstance(device, EmulatedDevice) else contextlib.nullcontext():
            for expert in experts:
                device.load(layer, expert, core.place(layer, expert))

    def _opened(self) -> tuple[_core.moe.Runtime, Device]:
        if self._core is None or self.device is None:
            raise ValueError("runtime: got one that is closed, expected an open one")
        return self._core, self.device

    def _run(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, scores: Tensor | None
    ) -> Tensor:
        with self._lock:
            core, device = self._opened()
            if self._given_up:
                self._recover(core, device)
            self._given_up = True
            begun = time.perf_counter()
            try:
                step = self._step_in_one if self._steps else self._step
                out = step(core, device, layer, x, ids, weights, scores)
            except BaseException as error:
                if core.under_way or not self._steps:
                    self._recover(core, device)
                self._given_up = False
                raised = core.take_error()
                if raised is not None:
                    raise raised from None
                if isinstance(error, Exception):
                    check_call(x, ids, weights, self._experts[layer].shape.hidden, scores)
                raise
            if self._recording is not None:
                self._recording.add(core, layer, begun, time.perf_counter())
            self._given_up = False
            return out

    def _recover(self, core: _core.moe.Runtime, device: Device) -> None:
        """What was queued may still run and nobody knows what a slot holds.

        A second Ctrl-C may end this early; then the next step does it again.
        """
        device.abort()
        for each in range(len(self._experts)):
            core.clear(each)
        self._given_up = False

    def _step(
        self,
        core: _core.moe.Runtime,
        device: Device,
        layer: int,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> Tensor:
        check_call(x, ids, weights, self._experts[layer].shape.hidden, scores)
        now = time.perf_counter()
        device.begin()
        given = x.detach().float().contiguous()
        rows = given.cpu()
        chosen = _array(ids)
        counts = _array(weights)
        likely = None if scores is None else _array(scores.float())
        if self._prefetch:
            for load in core.needless(layer, chosen, now):
                if device.cancel(layer, load[2]):
                    core.cancelled(*load)
        work: list[Work] = []
        for is_load, expert, slot, tokens in core.plan(layer, chosen, counts, likely, now):
            if not is_load:
                work.append(Work(expert, slot, tokens))
                continue
            if work and any(one.slot == slot for one in work):
                device.compute(layer, given, work)
                work = []
            device.load(layer, expert, slot)
        if work:
            device.compute(layer, given, work)
        if core.room_ahead:
            for load in core.look_ahead(self._guesses(layer, given, ids.shape[1])):
                device.load(*load)
        if core.on_cpu:
            core.compute(
                self._layouts[layer],
                self._experts[layer].data,
                rows.numpy(),
                self._computes[layer],
                self._paced,
            )
        found = device.collect() if core.on_device else None
        out = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
        core.combine(None if found is None else found.numpy(), out.numpy())
        core.finish()
        return out.to(x.device, x.dtype)

    def _step_in_one(
        self,
        core: _core.moe.Runtime,
        device: Device,
        layer: int,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> Tensor:
        """`_step` on an emulated device."""
        plain = x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()
        if not plain:
            check_call(x, ids, weights, self._experts[layer].shape.hidden, scores)
            ids, weights = ids.cpu(), weights.cpu()
        given = x if plain else x.float().cpu().contiguous()
        if scores is not None and not (scores.is_cpu and scores.dtype is torch.float32):
            scores = scores.float().cpu()
        number = self._steps[layer].number
        if not self._prefetch or (len(x) <= FEW and not self._other_routers):
            out: Tensor = step_of_runtime(given, ids, weights, scores, number)
        else:
            core.guess = lambda: self._guesses(layer, given, ids.shape[1])
            try:
                out = step_of_runtime(given, ids, weights, scores, number)
            finally:
                core.guess = None
        return out if plain else out.to(x.device, x.dtype)

    def _guesses(
        self, layer: int, x: Tensor, top_k: int
    ) -> list[tuple[int, int, NDArray[np.int64]]]:
        """What the routers of the next layers would choose for these tokens."""
        guesses = []
        for distance in range(1, self._prefetch + 1):
            router = self._routers.get(layer + distance)
            if router is not None:
                with torch.no_grad():
                    chosen = router(x).topk(top_k).indices
                guesses.append((layer + distance, distance, chosen.cpu().numpy()))
        return guesses


def _linear(matrix: Tensor, count: int) -> Router:
    """Of `count` experts, of which those that the matrix has no row for are always chosen."""

    def router(hidden: Tensor) -> Tensor:
        logits = hidden @ matrix.to(hidden.device).T
        return nn.functional.pad(logits, (0, count - len(matrix)), value=torch.inf)

    return router


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's numbers, without the steps that one on the CPU does not need: a worker waits."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    found: NDArray[Any] = (tensor if tensor.is_cpu else tensor.cpu()).numpy()
    return found


class _Place(NamedTuple):
    """Where a module stands."""

    runtime: Runtime
    layer: int


class HybridMoE(nn.Module):
    """The experts of one layer, without parameters; `Runtime.layer` gives those of a runtime.

    Args:
        experts: computed on the CPU alone, unless a runtime made the module.
    """

    def __init__(self, experts: Experts, place: _Place | None = None) -> None:
        super().__init__()
        given: Any = experts
        if not isinstance(given, Experts):
            raise TypeError(f"experts: got {type(given).__name__}, expected Experts")
        self.experts = experts
        self.place = place
        self._here = place is None or place.runtime.device is None
        self._call = bind_experts(experts)
        self._file = _mapping(experts)

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
            ValueError, TypeError: as `Experts`; scores that are missing or none; a runtime that is
                closed.
            RuntimeError: a worker or the device failed. The runtime may be used again.
            OSError: the file in which the experts lie has been written to.
        """
        if self._file is not None and self._file.size() < len(self._file):
            # Reading what is no longer there would end the process.
            raise ValueError(
                f"experts: the file of the experts has {self._file.size()} bytes left, expected "
                f"{len(self._file)}, as when it was mapped"
            )
        if self.experts.guard is not None:
            self.experts.guard()
        if self._here:
            if self.place is not None and self.place.runtime.closed:
                raise ValueError("runtime: got one that is closed, expected an open one")
            try:
                return self._call(x, ids, weights)
            except Exception:
                check_call(x, ids, weights, self.experts.shape.hidden, scores)
                raise
        assert self.place is not None
        return self.place.runtime._run(self.place.layer, x, ids, weights, scores)

    def __getstate__(self) -> dict[str, Any]:
        # What computes is made again where the experts are.
        made = ("_call", "_file")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._call = bind_experts(self.experts)
        self._file = _mapping(self.experts)


def _mapping(experts: Experts) -> mmap.mmap | None:
    """The mapped file that the weights lie in."""
    at: Any = experts.data
    while at is not None and not isinstance(at, mmap.mmap):
        at = at.obj if isinstance(at, memoryview) else getattr(at, "base", None)
    # Memory that is no file has no size of its own.
    with contextlib.suppress(OSError, ValueError):
        return at if at is not None and at.size() == len(at) else None
    return None


def check_call(x: Any, ids: Any, weights: Any, hidden: int, scores: Any = None) -> None:
    """Types and ranks of a call; the core sees to the rest."""
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for name, value, dtypes in (
        ("x", x, (torch.float32, torch.bfloat16)),
        ("ids", ids, (torch.int64,)),
        ("weights", weights, (torch.float32,)),
        *((("scores", scores, floats),) if scores is not None else ()),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
        if value.dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise TypeError(f"{name}.dtype: got {value.dtype}, expected {expected}")
        if value.ndim != 2:
            raise ValueError(f"{name}.ndim: got {value.ndim}, expected 2")
    if x.shape[1] != hidden:
        raise ValueError(f"x.shape[1]: got {x.shape[1]}, expected {hidden}")
    if ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids.shape[0]: got {ids.shape[0]}, expected {x.shape[0]}")
    if scores is not None and scores.shape[0] != x.shape[0]:
        raise ValueError(f"scores.shape[0]: got {scores.shape[0]}, expected {x.shape[0]}")


def check_device(device: Any, costs: Any) -> None:
    """What a runtime can refuse of a device before it has layers."""
    if device is not None and not isinstance(device, Device):
        raise TypeError(f"device: got {type(device).__name__}, expected a Device or None")
    if costs is not None and not isinstance(costs, CostModel):
        raise TypeError(f"costs: got {type(costs).__name__}, expected a CostModel or None")
    if costs is not None and device is None:
        raise ValueError("costs: got some without a device, expected None")
    if costs is not None and isinstance(device, EmulatedDevice):
        raise ValueError("costs: got some beside an emulated device, which has its own")


def _check_layers(layers: Any, reproducible: bool) -> None:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers: got {type(layers).__name__}, expected a mapping of Experts")
    if not layers:
        raise ValueError("layers: got none, expected one at least")
    for name, experts in layers.items():
        if not isinstance(experts, Experts):
            got = type(experts).__name__
            raise TypeError(f"layers[{name!r}]: got {got}, expected Experts")
        if reproducible and experts.compute != "int8":
            raise ValueError(
                f"layers[{name!r}].compute: got {experts.compute!r}, expected 'int8' with "
                "reproducible"
            )


def _slots(slots: int | Sequence[int] | None, layers: Sequence[Experts]) -> list[int]:
    if slots is None:
        return [max(1, of.shape.count // 4) for of in layers]
    given = [slots] * len(layers) if hasattr(slots, "__index__") else list(slots)
    if len(given) != len(layers):
        raise ValueError(f"slots: got {len(given)} numbers, expected {len(layers)}, one a layer")
    wanted = [whole(f"slots[{i}]", one) for i, one in enumerate(given)]
    return [min(one, of.shape.count) for one, of in zip(wanted, layers, strict=True)]


def _planner(
    costs: CostModel,
    device: Device,
    layers: Sequence[Experts],
    slots: Sequence[int],
    policy: Policy,
    cache: CachePolicy,
) -> _core.moe.Runtime:
    factor = device.factor if isinstance(device, EmulatedDevice) else 1.0
    assert factor is not None

    def curve(of: Curve, scale: float) -> tuple[list[float], list[float]]:
        return [float(t) for t in of.tokens], [scale * s for s in of.seconds]

    return _core.moe.Runtime(
        [(of.shape.count, count) for of, count in zip(layers, slots, strict=True)],
        STAGING,
        curve(costs.cpu, factor * costs.scale),
        curve(costs.gpu, factor),
        factor * costs.scale * costs.cpu_first,
        factor * costs.transfer,
        policy,
        cache,
    )
