"""The layers that the runtime's rows execute are those that a simulation adds up."""

import pytest
import torch

from quernstone.bench.cases import runtime as cases
from quernstone.moe import EmulatedDevice, Runtime
from quernstone.moe.simulate import simulate


def test_the_rows_add_up_what_a_simulation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    of, costs = cases.recorded(), cases.costs_of("h100")
    want = simulate(of.trace, costs, cases.slots(), policies=("fixed", "hybrid")).seconds
    monkeypatch.setattr(cases, "steps_of", lambda phase: range(of.trace.number_of_steps))
    for policy in ("fixed", "hybrid"):
        assert cases.simulated(costs, policy, "all") == pytest.approx(want[policy], rel=1e-12)


def test_an_executed_step_has_the_bits_of_the_cpu() -> None:
    of = cases.recorded()
    device = EmulatedDevice(cases.costs_of("h100"), factor=1e-4)
    steps = [*cases.steps_of("decode")[:3], *cases.steps_of("prefill")]
    with Runtime(of.experts, device, slots=cases.slots()) as runtime:
        outputs = [cases.run_step(runtime, step) for step in steps]
    assert cases.errors(range(steps[0], steps[0] + 3), outputs[:3]) == 0
    assert all(map(torch.equal, outputs[3], cases.wanted(steps[3])))
