"""Numbers of a few bits: schemes, rounding, quantised tensors and their files."""

from quernstone.quant.file import load, save
from quernstone.quant.linear import MatrixShape, PackedLinear, PackedMatrix
from quernstone.quant.rounding import NEAREST, Rounding, quantize
from quernstone.quant.scheme import Scheme
from quernstone.quant.tensor import QTensor, pack_bits, unpack_bits

__all__ = [
    "NEAREST",
    "MatrixShape",
    "PackedLinear",
    "PackedMatrix",
    "QTensor",
    "Rounding",
    "Scheme",
    "load",
    "pack_bits",
    "quantize",
    "save",
    "unpack_bits",
]
