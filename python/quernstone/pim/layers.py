"""The weights of a network as the matrices that lie in macros, and their integers.

Axes: g groups, n outputs of a group, k inputs of an output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quernstone.importers import Graph, Node
from quernstone.pim import checks
from quernstone.pim.api import hamming_count
from quernstone.pim.macro import MAX_BITS

Array = NDArray[Any]

_ROLES = {
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "linear": ("weight",),
    "lstm": ("weight", "recurrent"),
}
_LEAST_SCALE = 2.0**-40
# Products of two activations: their operands are written at run time and have no offline rate.
_UNKNOWN_OFFLINE = ("matmul", "attention")


@dataclass(frozen=True)
class Weight:
    """One weight of one node, and how it is a stack of matrices [g, n, k].

    A bank of a macro holds one row: the inputs of one output. The outputs of a convolution are its
    channels; of a transposed one, channels at one place of the kernel; of an LSTM its gates.
    """

    node: Node
    role: str
    constant: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The node's, with the role where it has several weights."""
        return self.node.name if self.role == "weight" else f"{self.node.name}.{self.role}"

    @property
    def groups(self) -> int:
        return int(self.node.attributes.get("groups", 1))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def _places(self) -> int:
        """Rows of one output channel."""
        return math.prod(self.shape[2:]) if self.node.op == "conv_transpose" else 1

    def matrices(self, array: Array | Tensor) -> Tensor:
        """[g, n, k] of an array in the layout of the weight."""
        x = torch.as_tensor(array)
        g = self.groups
        split = x.reshape(g, x.shape[0] // g, -1)
        # [c, n / g, ...] to [g, n / g x places, c / g].
        return split.transpose(1, 2).contiguous() if self.node.op == "conv_transpose" else split

    def array(self, matrices: Tensor) -> Tensor:
        """What `matrices` made, in the layout of the weight."""
        if self.node.op == "conv_transpose":
            matrices = matrices.transpose(1, 2)
        return matrices.reshape(self.shape)

    def per_row(self, channels: Tensor) -> Tensor:
        """[g, n] of one number for each output channel."""
        return channels.reshape(self.groups, -1).repeat_interleave(self._places, dim=1)

    def per_channel(self, rows: Tensor) -> Tensor:
        """For each output channel the largest number of its rows [g, n]."""
        return rows.reshape(-1, self._places).amax(-1)

    def beside(self, channels: Array) -> Array:
        """One number for each output channel, so that it broadcasts with the weight."""
        if self.node.op == "conv_transpose":
            # Channels of all groups share the second axis, groups the first.
            wide = np.repeat(
                channels.reshape(self.groups, -1), self.shape[0] // self.groups, axis=0
            )
            return wide.reshape(*wide.shape, *(1 for _ in self.shape[2:]))
        return channels.reshape(-1, *(1 for _ in self.shape[1:]))


def weights_of(graph: Graph) -> list[Weight]:
    """The weights that multiply activations, in the order of the nodes.

    Embeddings are looked up, not multiplied, and left out. A weight that two nodes share is listed
    for the first.

    Raises:
        ValueError: a convolution over more than two axes, by its name; no such weight at all.
    """
    found: list[Weight] = []
    known = set()
    for node in graph.nodes:
        for role in _ROLES.get(node.op, ()):
            constant = node.input(role)
            if constant is None or constant not in graph.constants or constant in known:
                continue
            shape = graph.constants[constant].shape
            if len(shape) > 4:
                raise ValueError(
                    f"{node.op} {node.name!r}: got a weight {shape}, expected a convolution over "
                    "one or two axes"
                )
            known.add(constant)
            found.append(Weight(node, role, constant, shape))
    if not found:
        raise ValueError("graph: got no layer with a constant weight, expected at least one")
    return found


def not_offline(graph: Graph) -> list[str]:
    """The nodes that multiply two activations: no rate of theirs is known before they run."""
    return [f"{node.op} {node.name!r}" for node in graph.nodes if node.op in _UNKNOWN_OFFLINE]


def rows_of(
    weight: Weight,
    given: Sequence[Tensor | None],
    made: Sequence[Tensor],
    most: int | None = None,
) -> Tensor:
    """The inputs [g, k, columns] that a weight multiplied in one run of its node.

    Args:
        given, made: inputs and outputs of the node.
        most: columns; more are thinned out evenly to about as many. None takes all.
    """
    x = given[0]
    assert x is not None
    node, attributes = weight.node, weight.node.attributes
    if weight.role == "recurrent":
        x = _hidden_before(made[0], given[4] if len(given) > 4 else None, attributes)
    if node.op in ("linear", "lstm"):
        return _thinned(x.reshape(-1, x.shape[-1]).T.unsqueeze(0), most)
    if node.op == "conv_transpose":
        whole = x.transpose(0, 1).reshape(weight.groups, x.shape[1] // weight.groups, -1)
        return _thinned(whole, most)
    windows = windows_of(node, x, weight.shape[2:])
    b, c, high, wide, *kernel = windows.shape
    step = 1 if most is None else max(1, math.isqrt(b * high * wide // max(most, 1)))
    picked = windows[:, :, ::step, ::step].permute(1, 4, 5, 0, 2, 3)
    return picked.reshape(weight.groups, c // weight.groups * math.prod(kernel), -1)


def _thinned(x: Tensor, most: int | None) -> Tensor:
    return x if most is None else x[..., :: max(1, x.shape[-1] // most)]


def windows_of(node: Node, x: Tensor, window: Sequence[int]) -> Tensor:
    """A view [b, c, high, wide, kernel...] of what each output of a convolution sees."""
    padding, stride, dilation = (
        list(node.attributes[name]) for name in ("padding", "stride", "dilation")
    )
    kernel = list(window)
    if x.ndim == 3:
        x = x.unsqueeze(2)
        padding, stride = [(0, 0), *padding], [1, *stride]
        dilation, kernel = [1, *dilation], [1, *kernel]
    x = functional.pad(x, [side for sides in reversed(padding) for side in sides]).contiguous()
    extents = [
        (x.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    by = x.stride()
    return x.as_strided(
        (*x.shape[:2], *extents, *kernel),
        (
            *by[:2],
            *(by[2 + axis] * stride[axis] for axis in (0, 1)),
            *(by[2 + axis] * dilation[axis] for axis in (0, 1)),
        ),
    )


def _hidden_before(out: Tensor, first: Tensor | None, attributes: Any) -> Tensor:
    """The hidden state before each step of an LSTM."""
    start = torch.zeros_like(out[:1]) if first is None else first.reshape(out[:1].shape)
    if attributes.get("reverse", False):
        return torch.cat([out[1:], start])
    return torch.cat([start, out[:-1]])


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight as integers that a macro stores.

        value = scale (stored - shift)

    Args:
        stored: integers in the layout of the weight.
        scale: one positive number for each output channel.
        shift: that was added before storing (WDS), one for the layer.
        bits: that each is stored in, two's complement.
        clipped: weights that the shift moved beyond the bits and that were cut.
    """

    weight: Weight
    stored: NDArray[np.int16]
    scale: NDArray[np.float64]
    shift: int = 0
    bits: int = 8
    clipped: int = 0

    def values(self) -> NDArray[np.float32]:
        """The weight that these integers stand for."""
        steps = self.stored.astype(np.float64) - self.shift
        found: NDArray[np.float32] = (steps * self.weight.beside(self.scale)).astype(np.float32)
        return found

    @property
    def ones(self) -> int:
        """Set bits of all that is stored."""
        return int(hamming_count(self.stored, self.bits).counts)

    @property
    def hamming_rate(self) -> float:
        return self.ones / (self.bits * self.stored.size)


def channel_scale(weight: Weight, array: Array, bits: int) -> NDArray[np.float64]:
    """For each output channel the least scale that clips nothing: max(min / low, max / high).

    low and high are those of two's complement, so a channel uses all of it on one side. A channel
    of zeros gets 1, and so does one whose weights decayed to nothing in training: they become
    zeros.

    Raises:
        ValueError: bits out of 2 to 16, a weight that is not finite.

    Source: the scale rule of the quantiser in the authors' code.
    """
    if checks.bits("bits", bits) < 2:
        raise ValueError(f"bits: got {bits}, expected 2 to {MAX_BITS}")
    low, high = checks.span(bits, signed=True)
    if not np.isfinite(array).all():
        raise ValueError(f"{weight.name}: got a weight that is not finite, expected finite numbers")
    matrices = weight.matrices(np.asarray(array, np.float64))
    scale = weight.per_channel(torch.maximum(matrices.amin(-1) / low, matrices.amax(-1) / high))
    return torch.where(scale >= _LEAST_SCALE, scale, 1.0).numpy()


def nearest_codes(weight: Weight, array: Array, bits: int = 8) -> Codes:
    """A weight rounded to the nearest integers of each channel's scale."""
    scale = channel_scale(weight, array, bits)
    low, high = checks.span(bits, signed=True)
    steps = np.asarray(array, np.float64) / weight.beside(scale)
    return Codes(weight, np.clip(np.round(steps), low, high).astype(np.int16), scale, bits=bits)
