"""The Hamming regulariser on a GPU: sums of interpolated Hamming weights, and their slopes.

A program takes BLOCK flat weights of a layer. It leaves one partial sum in fp32; the partial sums
are added in fp64 in their order, so that a result does not change from run to run.

Source: AIM (arXiv 2511.04321), our reading; formulas in csrc/pim/lhr.md. Oracle:
quernstone.pim.reference_lhr.
"""

import triton
import triton.language as tl


@triton.jit
def ones(code, MASK: tl.constexpr):
    """The number of set bits among the lowest 16 or fewer, as fp32."""
    u = code & MASK
    u = u - ((u >> 1) & 0x5555)
    u = (u & 0x3333) + ((u >> 2) & 0x3333)
    u = (u + (u >> 4)) & 0x0F0F
    return ((u + (u >> 8)) & 31).to(tl.float32)


@triton.jit
def inverse_scale(scales, at, present, width, group, scale_stride, SINGLE: tl.constexpr):
    """1 / scale of each weight; `scale_stride` is 0 where the channels share them."""
    if SINGLE:
        scale = tl.load(scales)
    else:
        row = at // width
        index = row * scale_stride + (at - row * width) // group
        scale = tl.load(scales + index, mask=present, other=1.0)
    return 1.0 / scale


@triton.jit
def clip(x, BITS: tl.constexpr):
    """To the codes; a NaN stays one."""
    high: tl.constexpr = 2.0 ** (BITS - 1) - 1
    low: tl.constexpr = -(2.0 ** (BITS - 1))
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


@triton.jit
def _lhr_fwd_kernel(
    weight, scales, partials, N, width, group, scale_stride, shift,
    BITS: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    MASK: tl.constexpr = 2**BITS - 1
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < N
    w = tl.load(weight + at, mask=present, other=0.0)
    inverse = inverse_scale(scales, at, present, width, group, scale_stride, SINGLE)
    x = clip(w * inverse + shift, BITS)
    below = tl.floor(x)
    code = below.to(tl.int32)
    count = ones(code, MASK)
    value = count + (x - below) * (ones(code + 1, MASK) - count)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(present, value, 0.0)))


@triton.jit
def _lhr_bwd_kernel(
    weight, scales, dmean, grad, N, width, group, scale_stride, shift,
    BITS: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    MASK: tl.constexpr = 2**BITS - 1
    margin: tl.constexpr = 2.0 ** (BITS - 22)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < N
    w = tl.load(weight + at, mask=present, other=0.0)
    inverse = inverse_scale(scales, at, present, width, group, scale_stride, SINGLE)
    x = w * inverse + shift
    # Farther than one code beyond the last ones the slope is 0 anyway.
    near = tl.where(tl.abs(x) > 2.0**BITS, tl.where(x < 0, -(2.0**BITS), 2.0**BITS), x)
    below = tl.floor(near - margin)
    above = tl.floor(near + margin) + 1.0
    change = ones(clip(above, BITS).to(tl.int32), MASK) - ones(clip(below, BITS).to(tl.int32), MASK)
    slope = change / (above - below)
    by = tl.load(dmean) / N
    tl.store(grad + at, slope * inverse * by, mask=present)
