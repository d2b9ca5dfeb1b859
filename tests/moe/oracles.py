"""The least makespan of a layer as a mixed-integer program, solved by HiGHS.

Nothing of the project's own reasoning is in it: no Johnson's rule, no order of the cached experts,
no partition into kinds. Each piece of work has a start; what shares a resource is pairwise apart.
"""

import math
from itertools import combinations
from typing import Any

import highspy

from quernstone.moe import Layer


def least_makespan(layer: Layer) -> float:
    """To about 1e-6 of the sum of all times, HiGHS's tolerances."""
    n = len(layer)
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 1e-9)
    model.setOptionValue("threads", 1)
    arrivals = [t for t in layer.ready.tolist() if math.isfinite(t)]
    horizon = max([*layer.starts[1:], *arrivals]) + sum(float(x.sum()) for x in layer.columns[2:])
    horizon += layer.cpu_first
    end = model.addVariable(lb=0.0, ub=horizon)
    on_gpu = [model.addBinary() for _ in range(n)]
    any_on_cpu = model.addBinary()

    def starts(lower: float) -> list[Any]:
        return [model.addVariable(lb=lower, ub=horizon) for _ in range(n)]

    def apart(i: int, j: int, start: list[Any], costs: list[float], both: Any) -> None:
        """`both` is 0 where i and j share the resource, more where they do not."""
        first = model.addBinary()
        model.addConstr(start[i] + costs[i] <= start[j] + horizon * (1 - first) + horizon * both)
        model.addConstr(start[j] + costs[j] <= start[i] + horizon * first + horizon * both)

    _, _, cpu, gpu, transfer = (column.tolist() for column in layer.columns)
    first, cpu_free, gpu_free, pcie_free = layer.starts
    bus_free = max([pcie_free, *arrivals])
    on_device, on_bus = starts(0.0), starts(bus_free)
    for i in range(n):
        model.addConstr(any_on_cpu >= 1 - on_gpu[i])
        model.addConstr(on_device[i] + (gpu[i] - cpu[i]) * on_gpu[i] + cpu[i] <= end)
        model.addConstr(on_device[i] >= gpu_free - gpu_free * (1 - on_gpu[i]))
        model.addConstr(
            on_device[i] >= cpu_free + first * any_on_cpu - (cpu_free + first) * on_gpu[i]
        )
        if math.isfinite(layer.ready[i]):
            model.addConstr(on_device[i] >= float(layer.ready[i]) * on_gpu[i])
        else:
            model.addConstr(on_device[i] >= on_bus[i] + transfer[i] - 2 * horizon * (1 - on_gpu[i]))
    for i, j in combinations(range(n), 2):
        apart(i, j, on_device, gpu, 2 - on_gpu[i] - on_gpu[j])
        apart(i, j, on_device, cpu, on_gpu[i] + on_gpu[j])
        if not math.isfinite(layer.ready[i]) and not math.isfinite(layer.ready[j]):
            apart(i, j, on_bus, transfer, 2 - on_gpu[i] - on_gpu[j])
    model.minimize(end)
    assert model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(model.val(end))
