"""A layer of DeepSeek-V2-Lite for the benchmarks of experts: weights, tokens, routings.

Axes: e experts, m hidden width, f feed-forward width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernstone.moe import MODELS, ExpertsShape, reference
from quernstone.moe.experts import Format

OF = MODELS["deepseek-v2-lite"]
FORMATS: tuple[Format, ...] = ("int4", "int8", "bf16")


@dataclass(frozen=True)
class ExpertCase:
    """A layer of DeepSeek-V2-Lite: `batch` tokens of six experts each."""

    format: Format
    batch: int
    threads: int
    quick: bool = False

    @property
    def id(self) -> str:
        name = f"{self.format}g32" if self.format == "int4" else self.format
        return f"moe.experts.{name}.dsv2lite.b{self.batch}.t{self.threads}"

    @property
    def shape(self) -> ExpertsShape:
        group = 32 if self.format == "int4" else 0
        return ExpertsShape(OF.experts, OF.hidden, OF.intermediate, self.format, group)


class Calls:
    """The same sequence of routings for every peer, and other experts in every call.

    64 experts are 311 MB in int4 and more in the others; a call reads six to all of them, and
    comes back to one when ten others have gone through the caches.
    """

    def __init__(self, case: ExpertCase, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.batch, OF.hidden, generator=generator).bfloat16()
        self.weights = torch.full((case.batch, OF.top_k), 1 / OF.top_k)
        self.ids = []
        for call in range(count):
            if case.batch == 1:
                first = torch.arange(OF.top_k)[None]
                self.ids.append((first + call * OF.top_k) % OF.experts)
            else:
                scores = torch.rand(case.batch, OF.experts, generator=generator)
                self.ids.append(scores.topk(OF.top_k).indices)

    def each(self) -> Callable[[], Tensor]:
        """Gives the ids of call after call, of its own count."""
        turn = itertools.cycle(self.ids)
        return lambda: next(turn)

    def bytes(self, shape: ExpertsShape) -> float:
        """That an average call has to read."""
        distinct = np.mean([len(ids.unique()) for ids in self.ids])
        return float(distinct) * shape.expert_bytes


@functools.lru_cache(maxsize=1)
def layer_weights() -> tuple[Tensor, Tensor]:
    """gate_up [e, 2f, m] and down [e, m, f], bf16, Gaussian."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.empty(OF.experts, 2 * OF.intermediate, OF.hidden, dtype=torch.bfloat16)
    narrow = torch.empty(OF.experts, OF.hidden, OF.intermediate, dtype=torch.bfloat16)
    for stack in (wide, narrow):
        for matrix in stack:
            matrix.normal_(std=stack.shape[2] ** -0.5, generator=generator)
    return wide, narrow


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def expected(matrices: Callable[[int], tuple[Tensor, Tensor, Tensor]], calls: Calls) -> Tensor:
    """fp64 of the first call, with the matrices of the experts that it uses."""
    ids = calls.ids[0]
    used = {int(e): matrices(int(e)) for e in ids.unique()}
    every = [used.get(e, used[int(ids[0, 0])]) for e in range(OF.experts)]
    return reference.experts(every, calls.x, ids, calls.weights)
