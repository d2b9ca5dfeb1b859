"""How far a result may be from the fp64 reference. The only numbers of their kind in these tests.

u is the unit roundoff, 2^-24 for fp32, 2^-11 for fp16 and 2^-8 for bf16. "Relative error" of
a tensor is the Frobenius norm of the difference over that of the reference.
"""

import torch
from torch import Tensor

U_FP32 = 2.0**-24
U_FP16 = 2.0**-11
U_BF16 = 2.0**-8

# Ours over a rival's error, where the promise is "never above". In fp32 none is needed. In bf16
# both errors are the same two roundings, of the weights and of the output, met in another order:
# they agree up to the sampling noise of their norms, 1 / sqrt(2 n) for n elements, which is
# below 0.4 % for the 32768 elements or more that are compared. Five standard deviations.
FP32_OVER_RIVAL = 1.0
BF16_OVER_RIVAL = 1.02


def output(dtype: torch.dtype, logit_sd: float = 1.0) -> float:
    """Relative error of the output.

    fp32: the promise for N(0, 1) inputs is 5e-7 = 8 u. A weight inherits the absolute error of its
    logit, which is a few u times the logit's size, so the bound grows with the logits.

    bf16, fp16: the weights and the output are rounded once each, by at most u; products of such
    numbers are exact in fp32, so that the logits' own error does not show.
    """
    if dtype is not torch.float32:
        return 2 * (U_BF16 if dtype is torch.bfloat16 else U_FP16)
    return 5e-7 * max(1.0, logit_sd)


def gradient(dtype: torch.dtype) -> float:
    """Relative error of a gradient.

    fp32: the promise, for any kind, mask and gate. bf16, fp16: output, incoming gradient and result
    are rounded once each.
    """
    if dtype is torch.float32:
        return 2e-6
    return 3 * (U_BF16 if dtype is torch.bfloat16 else U_FP16)


def lse(want: Tensor, width: int) -> float:
    """Absolute error of the log-sum-exp, in both types (it is kept in fp32).

    It inherits the error of the largest logits, which are within log(s) of it: d partial sums,
    each rounded by u times its size, add up like a random walk to sqrt(d) u; scale, exponential,
    sum and logarithm share 8 u.
    """
    finite = want[want.isfinite()].abs()
    return _logit(width) * (1.0 + (finite.max().item() if finite.numel() else 0.0))


def gate(argument: float, width: int) -> float:
    """Relative error of G = sigmoid(x), x being a difference of numbers up to `argument`.

    dG / G = (1 - G) dx, so that the absolute error of x becomes the relative error of G.
    """
    return _logit(width) * (2.0 + argument)


def _logit(width: int) -> float:
    return (8.0 + width**0.5) * U_FP32


# A gate that ought to be smaller may be anything up to this: a few times the smallest normal number
# of fp32 for each of a few hundred keys.
UNDERFLOW = 1e-35


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`; 0 for two tensors of zeros."""
    difference = torch.linalg.vector_norm(got.double() - want.double()).item()
    if difference == 0.0:
        return 0.0
    return difference / torch.linalg.vector_norm(want.double()).clamp(min=1e-300).item()
