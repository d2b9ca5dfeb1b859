"""Linear layers whose weights are packed once and multiplied as they are.

Axes: t tokens, n outputs, k inputs.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quernstone import _core
from quernstone.quant.rounding import quantize
from quernstone.quant.scheme import Scheme
from quernstone.quant.tensor import QTensor

Format = Literal["bf16", "int8", "int4"]
Compute = Literal["float", "int8", "mixed"]

_HUGE_PAGE = 1 << 21
_ALIGN = 64
_ROWS = 16  # of a block


@dataclass(frozen=True)
class MatrixShape:
    """The extents of a packed matrix and how its weights are stored.

    Args:
        outputs: n, 1 or more.
        inputs: k, 1 or more.
        format: "bf16"; "int8" with a scale for each output; "int4" with a bf16 scale for each
            output and group of inputs.
        group: inputs of a group of int4, 32, 64 or 128; 0 for the others.
        zero_points: whether int4 has a zero point beside each scale.

    Raises:
        ValueError: a field is out of range or contradicts another.
        TypeError: a field of another type.
    """

    outputs: int
    inputs: int
    format: Format = "int4"
    group: int = 32
    zero_points: bool = False

    def __post_init__(self) -> None:
        for name in ("outputs", "inputs", "group"):
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

    def layout(self) -> _core.Layout:
        return _core.Layout(self.format, self.outputs, self.inputs, self.group, self.zero_points)

    @property
    def nbytes(self) -> int:
        return self.layout().bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PackedMatrix:
    """A matrix [n, k] of weights in packed blocks.

    Args:
        shape: of the matrix.
        data: [shape.nbytes] uint8, at an address divisible by 64. It is kept, not copied.

    Raises:
        ValueError, TypeError: `data` is something else.
    """

    def __init__(self, shape: MatrixShape, data: NDArray[np.uint8]) -> None:
        self.shape = shape
        self.data = data
        self.layout = shape.layout()
        self.whole: PackedMatrix | None = None
        """The matrix of which this is a run of rows, see `rows`."""
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            got = data.dtype if isinstance(data, np.ndarray) else type(data).__name__
            raise TypeError(f"data: got {got}, expected an array of uint8")
        if data.shape != (shape.nbytes,) or not data.flags.c_contiguous:
            raise ValueError(f"data.shape: got {data.shape}, expected {(shape.nbytes,)} in one run")
        if data.ctypes.data % _ALIGN:
            raise ValueError("data: got memory that is not aligned, expected 64 bytes")

    def __reduce__(self) -> tuple[Any, tuple[MatrixShape, NDArray[np.uint8]]]:
        # The bytes that come back have to be aligned again.
        return PackedMatrix.of_bytes, (self.shape, self.data)

    @classmethod
    def empty(cls, shape: MatrixShape) -> Self:
        """Room for a matrix, in which all weights are zero."""
        return cls(shape, allocate_bytes(shape.nbytes, huge_pages=True))

    @staticmethod
    def of_bytes(shape: MatrixShape, data: NDArray[np.uint8]) -> PackedMatrix:
        """A matrix with a copy of packed bytes, wherever those lie."""
        if data.shape != (shape.nbytes,):
            raise ValueError(f"data.shape: got {data.shape}, expected {(shape.nbytes,)}")
        room = allocate_bytes(shape.nbytes, huge_pages=True)
        room[:] = data
        return PackedMatrix(shape, room)

    @classmethod
    def pack(
        cls,
        weight: Tensor | QTensor,
        *,
        format: Format = "int4",
        group: int | None = None,
        zero_points: bool = False,
        clips: int = 4,
    ) -> Self:
        """Packs a matrix.

        Args:
            weight: [n, k] floating point, or already quantised by the format's scheme.
            format, group, zero_points: see `MatrixShape`; None is a group of 32 for int4.
            clips: how many clipped ranges of a group are tried, see `quant.quantize`.

        Raises:
            ValueError: not two axes, a weight that is not finite.
            TypeError: a value of another type.
        """
        if not isinstance(weight, (Tensor, QTensor)):
            raise TypeError(f"weight: got {type(weight).__name__}, expected a Tensor or QTensor")
        if len(weight.shape) != 2:
            raise ValueError(f"weight.ndim: got {len(weight.shape)}, expected 2")
        if group is None:
            group = 32 if format == "int4" else 0
        shape = MatrixShape(weight.shape[0], weight.shape[1], format, group, zero_points)
        room = allocate_bytes(shape.nbytes, huge_pages=True)
        pack_into("weight", weight, shape, room, clips=clips)
        return cls(shape, room)

    def rows(self, begin: int, end: int) -> PackedMatrix:
        """Outputs begin to end as a matrix of its own in the same memory.

        Raises:
            ValueError: no such rows, or they begin or end within a block of 16.
        """
        shape = self.shape
        if not 0 <= begin < end <= shape.outputs:
            raise ValueError(f"rows: got {begin} to {end}, expected some of {shape.outputs}")
        if begin % _ROWS or (end % _ROWS and end != shape.outputs):
            raise ValueError(f"rows: got {begin} to {end}, expected whole blocks of {_ROWS}")
        of_block = shape.nbytes // -(-shape.outputs // _ROWS)
        part = MatrixShape(end - begin, shape.inputs, shape.format, shape.group, shape.zero_points)
        at = begin // _ROWS * of_block
        made = PackedMatrix(part, self.data[at : at + part.nbytes])
        made.whole = self
        return made

    def unpack(self) -> Tensor:
        """[n, k] fp32, the weights as they are computed with."""
        out = torch.empty(self.shape.outputs, self.shape.inputs, dtype=torch.float32, device="cpu")
        _core.unpack(self.layout, self.data, out.numpy())
        return out

    def __call__(self, x: Tensor, *, compute: Compute | None = None) -> Tensor:
        """x [t, k] fp32 or bf16 times the transpose, [t, n] in the dtype of x.

        A token's result depends neither on the number of threads nor on the other tokens; with
        "mixed" it depends on whether there are 64 or more.

        Args:
            x: on the CPU.
            compute: "int8" rounds activations to 8 bits in groups of 32, "float" does not. "mixed"
                rounds activations, and the numbers that codes stand for, to bf16 where 64 or more
                tokens are given and the processor multiplies tiles of bf16; else it is "int8", with
                bf16 weights "float". None is "int8" for int8 and int4 weights, "float" for bf16.

        Raises:
            ValueError: a shape or a compute out of its range.
            TypeError: x of another dtype.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a Tensor")
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"x.dtype: got {x.dtype}, expected torch.float32 or torch.bfloat16")
        if x.device.type != "cpu":
            raise ValueError(f"x.device: got {x.device}, expected cpu")
        rows = x.detach().float()
        if rows.ndim == 2 and rows.stride(1) != 1:
            rows = rows.contiguous()
        tokens = rows.shape[0] if rows.ndim else 0
        out = torch.empty(tokens, self.shape.outputs, dtype=torch.float32, device="cpu")
        how = check_compute(compute, self.shape.format)
        _core.multiply(self.layout, self.data, rows.numpy(), how, out.numpy())
        return out.to(x.dtype)


class PackedLinear(nn.Module):
    """A linear layer with packed weights, in the place of an `nn.Linear` that is not trained.

    Args:
        matrix: the weights [n, k].
        bias: [n] floating point, or None.
        compute: see `PackedMatrix.__call__`.

    Raises:
        ValueError: a bias of another length, a compute that the format has not.

    Oracle: `nn.Linear` with the weights of `matrix.unpack()`.
    """

    bias: Tensor | None

    def __init__(
        self, matrix: PackedMatrix, bias: Tensor | None = None, compute: Compute | None = None
    ) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (matrix.shape.outputs,):
            got = tuple(bias.shape)
            raise ValueError(f"bias.shape: got {got}, expected {(matrix.shape.outputs,)}")
        self.matrix = matrix
        self.compute = check_compute(compute, matrix.shape.format)
        self.in_features, self.out_features = matrix.shape.inputs, matrix.shape.outputs
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        *,
        format: Format = "int4",
        group: int | None = None,
        zero_points: bool = False,
        clips: int = 4,
        compute: Compute | None = None,
    ) -> Self:
        """A linear layer's weights, packed as `PackedMatrix.pack` does."""
        matrix = PackedMatrix.pack(
            linear.weight.detach(), format=format, group=group, zero_points=zero_points, clips=clips
        )
        return cls(matrix, linear.bias, compute)

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] fp32 or bf16 to [..., n] in the dtype of x; no gradient passes."""
        out = self.matrix(x.reshape(-1, x.shape[-1]), compute=self.compute)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        shape = self.matrix.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={shape.format}, compute={self.compute}"
        )


def pack_into(
    name: str,
    matrix: Tensor | QTensor,
    shape: MatrixShape,
    out: NDArray[np.uint8],
    *,
    clips: int = 4,
) -> None:
    """Packs weights of floats or codes into memory of their layout.

    Args:
        name: of the argument, for messages.
        matrix: [n, k].
        shape: of the matrix.
        out: [shape.nbytes].
        clips: see `quant.quantize`.

    Raises:
        ValueError, TypeError: a matrix of another shape, dtype, device or scheme; a weight that is
            not finite.
    """
    if not isinstance(matrix, (Tensor, QTensor)):
        raise TypeError(f"{name}: got {type(matrix).__name__}, expected a Tensor or QTensor")
    want = (shape.outputs, shape.inputs)
    if tuple(matrix.shape) != want:
        raise ValueError(f"{name}.shape: got {tuple(matrix.shape)}, expected {want}")
    layout = shape.layout()
    scheme = scheme_of(shape)
    if scheme is None:
        if isinstance(matrix, QTensor):
            raise TypeError(f"{name}: got a QTensor, expected a Tensor for bf16")
        if not matrix.is_floating_point():
            raise TypeError(f"{name}.dtype: got {matrix.dtype}, expected a floating-point dtype")
        if matrix.device.type != "cpu":
            raise ValueError(f"{name}.device: got {matrix.device}, expected cpu")
        rounded = matrix.detach().bfloat16()
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"{name}: got a weight that is not finite in bf16, expected none")
        bits = rounded.contiguous().view(torch.int16).numpy().view(np.uint16)
        _core.pack_bf16(layout, bits, out)
        return
    made = matrix if isinstance(matrix, QTensor) else quantize(matrix, scheme, clips=clips)
    if made.scheme != scheme:
        raise ValueError(f"{name}.scheme: got {made.scheme}, expected {scheme}")
    zeros = None if made.zero_points is None else made.zero_points.numpy()
    # Nibbles are stored without a sign, bytes with it.
    bias = 8 if shape.format == "int4" and scheme.symmetric else 0
    codes = (made.codes() + bias).to(torch.int8)
    _core.pack_codes(layout, codes.numpy(), made.scales.numpy(), zeros, out)


def scheme_of(shape: MatrixShape) -> Scheme | None:
    """The quantiser whose codes are stored; None for bf16."""
    if shape.format == "bf16":
        return None
    if shape.format == "int8":
        return Scheme(8)
    symmetric = not shape.zero_points
    return Scheme(4, symmetric, "group", shape.group, "bf16", full_range=symmetric)


def check_compute(compute: Compute | None, format: Format) -> Compute:
    """What `compute` stands for with weights of a format.

    Raises:
        ValueError: it is none of the names, or "int8" with bf16 weights.
    """
    if compute is None:
        return "float" if format == "bf16" else "int8"
    if compute not in get_args(Compute):
        raise ValueError(f"compute: got {compute!r}, expected one of {get_args(Compute)}")
    if compute == "int8" and format == "bf16":
        raise ValueError("compute: got 'int8' with bf16 weights, expected 'float' or 'mixed'")
    return compute


def allocate_bytes(size: int, *, huge_pages: bool) -> NDArray[np.uint8]:
    """Zeros at an address divisible by 64, or in pages of 2 MiB where the system gives such."""
    if not huge_pages or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = np.zeros(size + _ALIGN, np.uint8)
        return memory[-memory.ctypes.data % _ALIGN :][:size]
    room = mmap.mmap(-1, size + _HUGE_PAGE)
    pages = np.frombuffer(room, np.uint8)
    skip = -pages.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return pages[skip : skip + size]
