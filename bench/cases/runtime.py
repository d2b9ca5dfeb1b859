"""A trained model's expert layers on an emulated device: real tokens, routing and experts.

Axes: l layers, s steps, t tokens of a step, m hidden width, e experts, c choices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernstone.bench.tinylm import experts as tiny
from quernstone.bench.tinylm.corpus import HELD_OUT
from quernstone.moe import (
    MODELS,
    PRESETS,
    CostModel,
    Experts,
    ExpertsShape,
    Runtime,
    Trace,
    moe_blocks,
)
from quernstone.moe.schedule import Policy, schedule_layer
from quernstone.moe.simulate import active_experts, resident_experts

MODEL = "top6of64"
COSTS_OF = "deepseek-v2-lite"
"""Whose experts' costs are emulated: as many experts of a layer, as many of a token."""
WARM, DECODED, PROMPT = 24, 12, 128
SHARE = 0.25

Call = tuple[Tensor, Tensor, Tensor, Tensor]
"""x [t, m], ids [t, c], weights [t, c], scores [t, e]"""


@dataclass(frozen=True)
class Recorded:
    """What a trained model computes on held-out text, at the entrance of its expert layers."""

    experts: dict[str, Experts]
    routers: dict[str, Tensor]
    """[e, m] by layer."""
    steps: list[list[Call]]
    """[s][l]: decoded tokens first, the last step is a prompt."""
    trace: Trace


@functools.cache
def recorded() -> Recorded:
    model = tiny.load(MODEL)
    blocks = moe_blocks(model)
    seen: dict[str, Tensor] = {}
    handles = [
        block.experts.register_forward_pre_hook(
            lambda _, inputs, name=block.name: seen.__setitem__(name, inputs[0].detach().clone())
        )
        for block in blocks
    ]
    with torch.no_grad():
        tiny.run(model, next(tiny.batches(HELD_OUT)))
    for handle in handles:
        handle.remove()
    experts, routers = {}, {}
    for block in blocks:
        stack = block.experts
        experts[block.name] = Experts.pack(stack.gate_up_proj, stack.down_proj)
        routers[block.name] = block.router.weight.detach()
    tokens = WARM + DECODED
    parts = [slice(i, i + 1) for i in range(tokens)] + [slice(tokens, tokens + PROMPT)]
    top_k = tiny.CONFIGS[MODEL].top_k

    def call(name: str, part: slice) -> Call:
        x = seen[name][part].contiguous()
        scores = (x @ routers[name].T).softmax(-1)
        weights, ids = scores.topk(top_k)
        return x, ids, weights / weights.sum(-1, keepdim=True), scores

    steps = [[call(name, part) for name in experts] for part in parts]
    of = [torch.cat([step[layer][3] for step in steps]) for layer in range(len(blocks))]
    number = np.repeat(np.arange(len(parts)), [part.stop - part.start for part in parts])
    ids = [torch.cat([step[layer][1] for step in steps]) for layer in range(len(blocks))]
    trace = Trace.of(torch.stack(of).numpy(), top_k, ids=torch.stack(ids).numpy(), steps=number)
    return Recorded(experts, routers, steps, trace)


def costs_of(machine: str) -> CostModel:
    of = MODELS[COSTS_OF]
    shape = ExpertsShape(of.experts, of.hidden, of.intermediate)
    return CostModel.of_machine(PRESETS[machine], shape)


def slots() -> int:
    return round(SHARE * recorded().trace.experts)


def steps_of(phase: str) -> range:
    return (
        range(WARM, WARM + DECODED)
        if phase == "decode"
        else range(WARM + DECODED, WARM + DECODED + 1)
    )


@functools.cache
def resident() -> list[list[dict[int, bool]]]:
    """[l][s]: of each expert that the step needs, whether it is on the device, as simulated."""
    return resident_experts(recorded().trace, "reuse", slots())


def simulated(costs: CostModel, policy: Policy, phase: str) -> float:
    """Seconds of the steps of a phase, as `simulate` adds them up."""
    of, total = recorded(), 0.0
    for step in steps_of(phase):
        for layer in range(of.trace.layers):
            _, loads, ready = active_experts(of.trace, resident()[layer], layer, step)
            total += schedule_layer(costs.layer(loads, ready), policy).makespan
    return total


def run_step(runtime: Runtime, step: int, *, placed: bool = True) -> list[Tensor]:
    """The layers of a step, each with what a simulation says is on the device."""
    outputs = []
    for layer, (name, call) in enumerate(
        zip(recorded().experts, recorded().steps[step], strict=True)
    ):
        if placed:
            here = [expert for expert, hit in resident()[layer][step].items() if hit]
            runtime.place(name, here)
        outputs.append(runtime.layer(name)(*call))
    return outputs


@functools.cache
def wanted(step: int) -> list[Tensor]:
    """The outputs of a step by the CPU alone."""
    of = recorded()
    return [
        experts(*call[:3])
        for experts, call in zip(of.experts.values(), of.steps[step], strict=True)
    ]


def errors(steps: range, outputs: list[list[Tensor]]) -> int:
    """How many numbers have other bits than the CPU alone gives."""
    return sum(
        int((got.view(torch.int32) != want.view(torch.int32)).sum())
        for step, found in zip(steps, outputs, strict=True)
        for got, want in zip(found, wanted(step), strict=True)
    )
