"""Calls of the kernels of a device, for every place that runs them: shapes, tokens, packed bytes.

Axes: a assignments sorted by expert, p experts that have some, t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quernstone.moe import Experts, ExpertsShape, reference


@dataclass(frozen=True)
class DeviceCase:
    """Some experts of a layer, each with some tokens."""

    shape: ExpertsShape
    counts: tuple[int, ...]
    """Tokens of the last expert, of the one before it, and so on."""
    tokens: int = 7
    seed: int = 0

    def __str__(self) -> str:
        s = self.shape
        kind = f"{s.format}{f'g{s.group}' * (s.group > 0)}{'z' * s.zero_points}"
        return f"{kind} m {s.hidden} f {s.intermediate} tokens {self.counts}"

    def make(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)
        shape = self.shape
        wide = torch.randn(shape.count, 2 * shape.intermediate, shape.hidden, generator=generator)
        narrow = torch.randn(shape.count, shape.hidden, shape.intermediate, generator=generator)
        experts = Experts.pack(
            wide * shape.hidden**-0.5,
            narrow * shape.intermediate**-0.5,
            format=shape.format,
            group=shape.group,
            zero_points=shape.zero_points,
            clips=1,
        )
        x = torch.randn(self.tokens, shape.hidden, generator=generator)
        rows = torch.randint(self.tokens, (sum(self.counts),), generator=generator)
        return Call(experts, self.counts, x, rows)


@dataclass(frozen=True)
class Call:
    """What the kernels are given, on the CPU."""

    experts: Experts
    counts: tuple[int, ...]
    x: Tensor
    """[t, m] fp32"""
    tokens: Tensor
    """[a]"""

    @property
    def data(self) -> Tensor:
        return torch.from_numpy(self.experts.data)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `few_tokens`; `grouped_experts` wants x in bf16."""
        shape, rows = self.experts.shape, self.tokens.numpy()
        return shape, self.data, self.offsets, self.counts, rows, self.x

    @property
    def chosen(self) -> list[int]:
        """[p] from the last expert on, so that no place is its expert's number."""
        return [self.experts.shape.count - 1 - i for i in range(len(self.counts))]

    @property
    def offsets(self) -> list[int]:
        return [e * self.experts.shape.expert_bytes for e in self.chosen]

    @property
    def ids(self) -> Tensor:
        """[a, 1]"""
        return torch.tensor(self.chosen).repeat_interleave(torch.tensor(self.counts))[:, None]

    def on_the_cpu(self) -> Tensor:
        """[a, m], by the CPU's kernels with activations of 8 bits."""
        ones = torch.ones(len(self.tokens), 1)
        return self.experts(self.x[self.tokens], self.ids, ones, compute="int8")

    def expected(self) -> Tensor:
        """[a, m] fp64"""
        matrices = [self.experts.matrices(e) for e in range(self.experts.shape.count)]
        ones = torch.ones(len(self.tokens), 1)
        return reference.experts(matrices, self.x[self.tokens], self.ids, ones)


# Outputs and inputs around the blocks of 16, the units of 32 and the groups; rows that take one
# chunk of 32 groups, part of one, and several; tokens around the four of a thread block.
FEW_TOKENS = (
    DeviceCase(ExpertsShape(3, 32, 32, "int4", 32), (1, 1, 1)),
    DeviceCase(ExpertsShape(3, 33, 15, "int4", 32), (2, 1)),
    DeviceCase(ExpertsShape(2, 47, 49, "int4", 32, True), (4,)),
    DeviceCase(ExpertsShape(2, 130, 33, "int4", 64), (1, 5)),
    DeviceCase(ExpertsShape(2, 64, 96, "int4", 64, True), (3, 9)),
    DeviceCase(ExpertsShape(2, 129, 31, "int4", 128, True), (2, 2)),
    DeviceCase(ExpertsShape(1, 16, 2100, "int4", 128), (1,)),
    DeviceCase(ExpertsShape(1, 1056, 17, "int4", 32, True), (3,)),
    DeviceCase(ExpertsShape(1, 1, 1, "int4", 32), (1,)),
    DeviceCase(ExpertsShape(3, 32, 32, "int8", 0), (1, 1, 1)),
    DeviceCase(ExpertsShape(3, 65, 47, "int8", 0), (2, 1)),
    DeviceCase(ExpertsShape(2, 1090, 34, "int8", 0), (1, 7)),
    DeviceCase(ExpertsShape(1, 16, 1100, "int8", 0), (4,)),
)
