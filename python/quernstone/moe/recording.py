"""What a runtime of experts did, beside what its schedules said."""

from __future__ import annotations

from dataclasses import dataclass

from quernstone import _core
from quernstone.moe.devices import Device
from quernstone.moe.schedule import Interval
from quernstone.plan import Interval as PlanInterval
from quernstone.plan import Plan


@dataclass
class LayerTime:
    """A layer of a step: what the plan said, and what came of it."""

    layer: int
    begun: float
    """By `time.perf_counter`."""
    predicted: float
    """Seconds, the factor of an emulated device included."""
    took: float
    hits: int
    """Experts that were on the device."""
    active: int


class Recording:
    """What was done and what was planned, on one clock."""

    def __init__(self, device: Device | None, layers: tuple[str, ...]) -> None:
        self.steps: list[LayerTime] = []
        self.real: list[Interval] = []
        self.planned: list[Interval] = []
        self.device = device
        self.layers = layers

    def add(self, core: _core.moe.Runtime, layer: int, begun: float, ended: float) -> None:
        assert self.device is not None
        self.steps.append(
            LayerTime(layer, begun, core.makespan, ended - begun, core.hits, core.active)
        )
        for resource, start, end, expert, kind in core.predicted():
            span = begun + start, begun + end
            self.planned.append((resource, *span, f"{layer}.{expert}", kind))
        for experts, start, end in core.spans() if core.on_cpu else ():
            label = " ".join(f"{layer}.{expert}" for expert in experts)
            self.real.append(("cpu", start, end, label, "compute"))
        self.real += self.device.times()

    def plan(self) -> Plan:
        """What was done, by recorded time-stamps."""
        return self._plan(self.real, "recorded")

    def predicted(self) -> Plan:
        """What the schedules said, each from the real start of its layer on."""
        return self._plan(self.planned, "planned")

    def _plan(self, found: list[Interval], what: str) -> Plan:
        name = "no device" if self.device is None else self.device.name
        begun = min([step.begun for step in self.steps], default=0.0)
        shown = [
            (resource, max(0.0, start - begun), max(0.0, end - begun), label, kind)
            for resource, start, end, label, kind in found
        ]
        title = f"{what}: {name}"
        return Plan(
            ("gpu", "pcie", "cpu"), tuple(PlanInterval(*one) for one in sorted(shown)), title=title
        )
