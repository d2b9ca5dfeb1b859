"""The least makespan of a layer as a mixed-integer program, solved by HiGHS.

Nothing of the project's own reasoning is in it: no Johnson's rule, no order of the cached experts,
no partition into kinds. Each piece of work has a start; what shares a resource is pairwise apart.
"""

import math
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from quernstone.moe import Layer


class _Program:
    """Variables, and rows: sum of coefficient times variable <= limit."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.whole: list[int] = []
        self.rows: list[dict[int, float]] = []
        self.limits: list[float] = []

    def variable(self, lower: float, upper: float) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(0)
        return len(self.lower) - 1

    def flag(self) -> int:
        at = self.variable(0.0, 1.0)
        self.whole[at] = 1
        return at

    def require(self, terms: dict[int, float], limit: float) -> None:
        self.rows.append(terms)
        self.limits.append(limit)

    def least(self, variable: int) -> float:
        entries = [(i, at, value) for i, row in enumerate(self.rows) for at, value in row.items()]
        i, at, values = zip(*entries, strict=True)
        shape = (len(self.rows), len(self.lower))
        # Presolve ends in an error on a few programs, which are solved without it.
        for presolve in (True, False):
            result = milp(
                np.arange(len(self.lower)) == variable,
                constraints=LinearConstraint(coo_array((values, (i, at)), shape), ub=self.limits),
                integrality=self.whole,
                bounds=Bounds(self.lower, self.upper),
                options={"mip_rel_gap": 0.0, "presolve": presolve},
            )
            if result.success:
                break
        assert result.success, result.message
        return float(result.fun)


def least_makespan(layer: Layer) -> float:
    """To about 1e-6 of the sum of all times, HiGHS's tolerances."""
    n = len(layer)
    arrivals = [t for t in layer.ready.tolist() if math.isfinite(t)]
    horizon = max([*layer.starts[1:], *arrivals]) + sum(float(x.sum()) for x in layer.columns[2:])
    horizon += layer.cpu_first
    program = _Program()
    end = program.variable(0.0, horizon)
    on_gpu = [program.flag() for _ in range(n)]
    any_on_cpu = program.flag()

    def apart(i: int, j: int, start: list[int], costs: list[float], both: tuple[float, float]):
        """They share the resource where both[0] + both[1] (on_gpu[i] + on_gpu[j]) is 0."""
        first = program.flag()
        base, slope = horizon * both[0], -horizon * both[1]
        on = {on_gpu[i]: slope, on_gpu[j]: slope}
        program.require(
            {start[i]: 1.0, start[j]: -1.0, first: horizon, **on}, base + horizon - costs[i]
        )
        program.require({start[j]: 1.0, start[i]: -1.0, first: -horizon, **on}, base - costs[j])

    _, _, cpu, gpu, transfer = (column.tolist() for column in layer.columns)
    first, cpu_free, gpu_free, pcie_free = layer.starts
    bus_free = max([pcie_free, *arrivals])
    on_device = [program.variable(0.0, horizon) for _ in range(n)]
    on_bus = [program.variable(bus_free, horizon) for _ in range(n)]
    for i in range(n):
        start, placed = on_device[i], on_gpu[i]
        program.require({placed: -1.0, any_on_cpu: -1.0}, -1.0)
        program.require({start: 1.0, placed: gpu[i] - cpu[i], end: -1.0}, -cpu[i])
        program.require({start: -1.0, placed: gpu_free}, 0.0)
        program.require({start: -1.0, any_on_cpu: first, placed: -(cpu_free + first)}, -cpu_free)
        if math.isfinite(layer.ready[i]):
            program.require({start: -1.0, placed: float(layer.ready[i])}, 0.0)
        else:
            late = {start: -1.0, on_bus[i]: 1.0, placed: 2.0 * horizon}
            program.require(late, 2.0 * horizon - transfer[i])
    for i, j in combinations(range(n), 2):
        apart(i, j, on_device, gpu, (2.0, -1.0))
        apart(i, j, on_device, cpu, (0.0, 1.0))
        if not math.isfinite(layer.ready[i]) and not math.isfinite(layer.ready[j]):
            apart(i, j, on_bus, transfer, (2.0, -1.0))
    return program.least(end)
