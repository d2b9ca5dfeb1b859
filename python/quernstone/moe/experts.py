"""Gated feed-forward experts whose weights are packed once and never unpacked as a whole.

Axes: t tokens, c choices of a token, e experts, m hidden (model) width, f feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernstone import _core
from quernstone.quant import QTensor, Scheme
from quernstone.quant.linear import Compute as Compute
from quernstone.quant.linear import Format as Format
from quernstone.quant.linear import (
    MatrixShape,
    allocate_bytes,
    check_compute,
    pack_into,
    scheme_of,
)

_ALIGN = 64


@dataclass(frozen=True)
class ExpertsShape:
    """How many experts of what size, and how their weights are stored.

    Args:
        count: of the experts, 1 to 4096.
        hidden: m, the width of a token.
        intermediate: f.
        format: "bf16"; "int8" with a scale for each output; "int4" with a bf16 scale for each
            output and group of inputs.
        group: inputs of a group of int4, 32, 64 or 128; 0 for the others.
        zero_points: whether int4 has a zero point beside each scale.

    Raises:
        ValueError: a field is out of range or contradicts another.
        TypeError: a field of another type.
    """

    count: int
    hidden: int
    intermediate: int
    format: Format = "int4"
    group: int = 32
    zero_points: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "hidden", "intermediate", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an int")
            if not 0 <= value < 1 << 31:  # what the core takes is less by far
                raise ValueError(f"{name}: got {value}, expected 0 or more and below 2^31")
        if not isinstance(self.zero_points, bool):
            raise TypeError(f"zero_points: got {self.zero_points!r}, expected a bool")
        if self.format not in get_args(Format):
            raise ValueError(f"format: got {self.format!r}, expected one of {get_args(Format)}")
        if self.format != "int4" and self.group:
            raise ValueError(f"group: got {self.group} with {self.format!r}, expected 0")
        self.layout()

    def layout(self) -> _core.moe.ExpertsLayout:
        return _core.moe.ExpertsLayout(
            self.format, self.count, self.hidden, self.intermediate, self.group, self.zero_points
        )

    @property
    def nbytes(self) -> int:
        """Of all packed experts."""
        return self.layout().bytes

    @property
    def expert_bytes(self) -> int:
        """Of one of them."""
        return self.layout().expert_bytes

    @property
    def scheme(self) -> Scheme | None:
        """The quantiser whose codes are stored; None for bf16."""
        return scheme_of(
            MatrixShape(self.intermediate, self.hidden, self.format, self.group, self.zero_points)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Experts:
    """The experts of a layer: y = sum over c of weight[c] down(silu(gate(x)) * up(x)).

    Args:
        shape: of the layer.
        data: [shape.nbytes] uint8, packed experts, at an address divisible by 64. It is kept, not
            copied.
        compute: what a call that names none uses, see `__call__`.

    Raises:
        ValueError, TypeError: `data` is something else.
    """

    def __init__(
        self, shape: ExpertsShape, data: NDArray[np.uint8], compute: Compute | None = None
    ) -> None:
        self.shape = shape
        self.data = data
        self.compute = compute
        self.guard: Callable[[], None] | None = None
        """Raises where the memory is no longer what it was: called before every use."""
        self._layout = shape.layout()
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            got = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
            raise TypeError(f"data: got {got}, expected an array of uint8")
        if data.shape != (shape.nbytes,) or not data.flags.c_contiguous:
            raise ValueError(f"data.shape: got {data.shape}, expected {(shape.nbytes,)} in one run")
        if data.ctypes.data % _ALIGN:
            raise ValueError("data: got memory that is not aligned, expected 64 bytes")

    @property
    def compute(self) -> Compute:
        """What a call that names none uses; None sets what fits the format."""
        return self._compute

    @compute.setter
    def compute(self, compute: Compute | None) -> None:
        self._compute: Compute = check_compute(compute, self.shape.format)

    def __reduce__(self) -> tuple[Any, tuple[ExpertsShape, NDArray[np.uint8], Compute]]:
        # The bytes that come back have to be aligned again.
        return _restored, (self.shape, self.data, self.compute)

    @classmethod
    def empty(cls, shape: ExpertsShape, *, huge_pages: bool = True) -> Experts:
        """Room for experts that `place` fills; a new one's weights are zero."""
        return cls(shape, allocate_bytes(shape.nbytes, huge_pages=huge_pages))

    @classmethod
    def pack(
        cls,
        gate_up: Tensor,
        down: Tensor,
        *,
        format: Format = "int4",
        group: int | None = None,
        zero_points: bool = False,
        clips: int = 4,
    ) -> Experts:
        """Packs the weights of a layer as transformers has them.

        Args:
            gate_up: [e, 2 f, m] floating point, gate above up.
            down: [e, m, f].
            format, group, zero_points: see `ExpertsShape`; None is a group of 32 for int4.
            clips: how many clipped ranges of a group are tried, see `quant.quantize`.

        Raises:
            ValueError: shapes that do not belong together, a weight that is not finite.
            TypeError: a value of another type.
        """
        for name, x in (("gate_up", gate_up), ("down", down)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: got {got}, expected a tensor of floats")
            if x.ndim != 3:
                raise ValueError(f"{name}.ndim: got {x.ndim}, expected 3")
        count, double, hidden = gate_up.shape
        if double % 2:
            raise ValueError(f"gate_up.shape[1]: got {double}, expected an even number")
        want = (count, hidden, double // 2)
        if tuple(down.shape) != want:
            raise ValueError(f"down.shape: got {tuple(down.shape)}, expected {want}")
        if group is None:
            group = 32 if format == "int4" else 0
        shape = ExpertsShape(count, hidden, double // 2, format, group, zero_points)
        experts = cls.empty(shape)
        for e in range(count):
            gate, up = gate_up[e].detach().chunk(2)
            experts.place(e, gate, up, down[e].detach(), clips=clips)
        return experts

    def place(
        self,
        index: int,
        gate: Tensor | QTensor,
        up: Tensor | QTensor,
        down: Tensor | QTensor,
        *,
        clips: int = 4,
    ) -> None:
        """Packs one expert's matrices into its place.

        Args:
            index: of the expert.
            gate, up: [f, m] floating point, or already quantised by `shape.scheme`.
            down: [m, f].
            clips: how many clipped ranges of a group are tried, see `quant.quantize`.

        Raises:
            ValueError, TypeError: an index out of range, a matrix of another shape or scheme.
        """
        wide, narrow = self.shape.intermediate, self.shape.hidden
        parts = [
            self._packed("gate", gate, (wide, narrow), clips),
            self._packed("up", up, (wide, narrow), clips),
            self._packed("down", down, (narrow, wide), clips),
        ]
        _core.moe.place_expert(self._layout, index, parts[0], parts[1], parts[2], self.data)

    def matrices(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and up [f, m] and down [m, f] of an expert as fp32, as they are computed with."""
        if not 0 <= index < self.shape.count:
            raise ValueError(f"index: got {index}, expected 0 to {self.shape.count - 1}")
        size = self.shape.expert_bytes
        data = self.data[index * size : (index + 1) * size]
        wide, narrow = self.shape.intermediate, self.shape.hidden
        across = self._matrix(wide, narrow)
        blocks = -(-wide // 16)
        pairs = data[: 2 * across.bytes].reshape(blocks, 2, across.bytes // blocks)
        gate, up = (self._unpacked(wide, narrow, pairs[:, i].reshape(-1)) for i in range(2))
        return gate, up, self._unpacked(narrow, wide, data[2 * across.bytes :])

    def __call__(
        self, x: Tensor, ids: Tensor, weights: Tensor, *, compute: Compute | None = None
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Results depend neither on the number of threads nor on the other tokens, with "mixed" on
        how many tokens share an expert. Experts are summed in the order of their numbers.

        Args:
            x: [t, m] fp32 or bf16, on the CPU.
            ids: [t, c] int64, the experts of a token, none twice; -1 is none here.
            weights: [t, c] fp32, what each counts, finite.
            compute: "int8" rounds activations to 8 bits in groups of 32, "float" does not. "mixed"
                rounds activations, and the numbers that codes stand for, to bf16 in experts of 64
                or more tokens, where the processor multiplies tiles of bf16; other experts are
                computed as "int8", with bf16 weights as "float". None is `self.compute`, unless
                told otherwise "int8" for int8 and int4 weights, and "float" for bf16.

        Returns:
            [t, m] in the dtype of x.

        Raises:
            ValueError: a shape, an id or a compute out of its range, a weight that is not finite.
            TypeError: a tensor of another dtype.
            OSError: the file in which the experts lie has changed.

        Source: the feed-forward block of Mixtral (arXiv 2401.04088, section 2.1). Oracles: the
        blocks of transformers; `quernstone.moe.reference.experts`.
        """
        for name, value, dtypes in (
            ("x", x, (torch.float32, torch.bfloat16)),
            ("ids", ids, (torch.int64,)),
            ("weights", weights, (torch.float32,)),
        ):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
            if value.dtype not in dtypes:
                expected = " or ".join(map(str, dtypes))
                raise TypeError(f"{name}.dtype: got {value.dtype}, expected {expected}")
            if value.device.type != "cpu":
                raise ValueError(f"{name}.device: got {value.device}, expected cpu")
            if value.ndim != 2:
                raise ValueError(f"{name}.ndim: got {value.ndim}, expected 2")
        how = self.compute if compute is None else check_compute(compute, self.shape.format)
        if self.guard is not None:
            self.guard()
        rows = x.detach().float()
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
        _core.moe.experts_forward(
            self._layout,
            self.data,
            rows.numpy(),
            ids.numpy(),
            weights.detach().numpy(),
            how,
            out.numpy(),
        )
        return out.to(x.dtype)

    def _matrix(self, rows: int, inputs: int) -> _core.Layout:
        shape = self.shape
        return _core.Layout(shape.format, rows, inputs, shape.group, shape.zero_points)

    def _packed(
        self, name: str, matrix: Tensor | QTensor, want: tuple[int, int], clips: int
    ) -> NDArray[np.uint8]:
        of = self.shape
        shape = MatrixShape(*want, of.format, of.group, of.zero_points)
        out = allocate_bytes(shape.nbytes, huge_pages=False)
        pack_into(name, matrix, shape, out, clips=clips)
        return out

    def _unpacked(self, rows: int, inputs: int, data: NDArray[np.uint8]) -> Tensor:
        layout = self._matrix(rows, inputs)
        packed = allocate_bytes(layout.bytes, huge_pages=False)
        packed[:] = data
        out = torch.empty(rows, inputs, dtype=torch.float32, device="cpu")
        _core.unpack(layout, packed, out.numpy())
        return out


def _restored(shape: ExpertsShape, data: NDArray[np.uint8], compute: Compute) -> Experts:
    experts = Experts.empty(shape)
    experts.data[:] = data
    experts.compute = compute
    return experts


def route(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax, then the largest: ids and weights as `Experts` takes them.

    Args:
        logits: [t, e] floating point.
        top_k: 1 to e.
        renormalize: whether the weights of a token sum to 1 (Mixtral, Qwen3-MoE) or are left as
            the softmax has them (OLMoE, Qwen2-MoE).

    Returns:
        ids [t, top_k] int64 by falling weight, weights [t, top_k] fp32.

    Raises:
        ValueError: a logit that is NaN or infinite in fp32, `top_k` out of its range.
        TypeError: logits that are no floats.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: got {got}, expected a tensor of floats")
    if logits.ndim != 2:
        raise ValueError(f"logits.ndim: got {logits.ndim}, expected 2")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: got {top_k}, expected 1 to {logits.shape[1]}")
    wide = logits.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("logits: got a number that is not finite in fp32, expected none")
    weights, ids = wide.softmax(-1).topk(top_k)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights
