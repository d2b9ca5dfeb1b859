"""Grouped experts on a GPU: silu(gate x) * (up x), then down, for tokens sorted by expert.

Axes: a assignments (a token at one of its experts) sorted by expert, t tokens, m hidden width,
f feed-forward width, n outputs and k inputs of a matrix.

Weights are read as csrc/gemm/README.md lays them out for the CPU, so that the bytes of an expert
are the same on both sides of the bus and nothing is repacked. A 32-bit word holds 8, 4 or 2 inputs
(int4, int8, bf16) of one output, and the words of 16 outputs lie beside each other.

A program makes BLOCK_N outputs of up to BLOCK_T assignments of one expert, as w x^T: the weights
are the left operand, which a tensor core takes from registers, where they are unpacked. They
become bf16 there, which rounds the product of code and scale; sums are fp32. Whatever the tile, a
result depends on its own token alone.

Oracle: quernstone.moe.reference.experts.
"""

import triton
import triton.language as tl

INT4 = tl.constexpr(4)
INT8 = tl.constexpr(8)
BF16 = tl.constexpr(16)

ROWS = tl.constexpr(16)  # outputs of a packed block


@triton.jit
def bf16_bits(x):
    """fp32 of numbers whose bits are those of bf16; the interpreter reads bf16 otherwise."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def unpacked(words, BITS: tl.constexpr):
    """[n, k] fp32 codes of words [n, k / inputs of a word]; int4 without its zero points."""
    COUNT: tl.constexpr = 32 // BITS
    i = tl.arange(0, COUNT)
    # Of int4, the low halves of the bytes come first.
    shift = 8 * (i % 4) + 4 * (i // 4) if BITS == 4 else BITS * i
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    codes = tl.reshape(codes, (words.shape[0], words.shape[1] * COUNT))
    if BITS == 16:
        codes = bf16_bits(codes)
    elif BITS == 8:
        codes = (codes - 128).to(tl.float32)
    else:
        codes = codes.to(tl.float32)
    return codes


@triton.jit
def weights_tile(
    matrix,  # the first block
    row,  # [n] outputs
    start,  # of the inputs
    padded,  # inputs of a packed row
    rows,  # packed outputs
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    PITCH: tl.constexpr,  # bytes from a block to the next one of the matrix
    BLOCK_K: tl.constexpr,
):
    """[n, BLOCK_K] bf16 weights; int8 lacks its scale, which an output has but one of."""
    COUNT: tl.constexpr = 32 // BITS
    block = (row // ROWS).to(tl.int64)
    within = row % ROWS
    line = start // COUNT + tl.arange(0, BLOCK_K // COUNT)
    real = row < rows
    words = tl.load(
        matrix.to(tl.pointer_type(tl.int32), bitcast=True)
        + (block * (PITCH // 4) + within)[:, None]
        + (line * ROWS)[None, :],
        mask=real[:, None] & (line < padded // COUNT)[None, :],
        other=0,
    )
    w = unpacked(words, BITS)
    if BITS == 4:
        # Groups of a scale within the tile; the tile is within one where that is longer.
        OF_SCALE: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
        SCALES: tl.constexpr = BLOCK_K // OF_SCALE
        group = start // GROUP + tl.arange(0, SCALES)
        inside = real[:, None] & (group < padded // GROUP)[None, :]
        at = within[:, None] + (group * ROWS)[None, :]
        bits = tl.load(
            (matrix + CODE_BYTES).to(tl.pointer_type(tl.uint16), bitcast=True)
            + (block * (PITCH // 2))[:, None]
            + at,
            mask=inside,
            other=0,
        )
        scale = bf16_bits(bits)
        if ZEROS:
            zero = tl.load(
                matrix + CODE_BYTES + SCALE_BYTES + (block * PITCH)[:, None] + at,
                mask=inside,
                other=0,
            ).to(tl.float32)
        else:
            zero = 8.0
        # Exact: codes have 4 digits and scales 8.
        w = tl.reshape(w, (row.shape[0], SCALES, OF_SCALE))
        w = w * scale[:, :, None] - (zero * scale)[:, :, None]
        w = tl.reshape(w, (row.shape[0], BLOCK_K))
    return w.to(tl.bfloat16)


@triton.jit
def dot(w, x, acc, DOT_IN_FP32: tl.constexpr):
    """acc + w x; DOT_IN_FP32 is for Triton's interpreter, which multiplies the bits of bf16."""
    if DOT_IN_FP32:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def int8_scales(matrix, row, rows, CODE_BYTES: tl.constexpr, PITCH: tl.constexpr):
    """[n] fp32"""
    scales = (matrix + CODE_BYTES).to(tl.pointer_type(tl.float32), bitcast=True)
    at = (row // ROWS).to(tl.int64) * (PITCH // 4) + row % ROWS
    return tl.load(scales + at, mask=row < rows, other=0.0)


@triton.jit
def tile_of(tiles, tile):
    """(place of the expert, first assignment, their number) of a tile."""
    return tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)


@triton.jit(do_not_specialize=["TILES", "M", "F"])
def _experts_gate_up_kernel(
    data,  # packed experts, bytes, aligned to 64
    offsets,  # [p] int64, bytes from `data` to the expert at place p
    tiles,  # [tiles, 3] int32: place, first assignment, number of assignments
    tokens,  # [a] int32: row of x
    x,  # [t, m] bf16
    inner,  # [a, f] bf16
    TILES,
    M,
    F,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    # Neighbours share the expert's weights, not the tokens, which are fewer bytes.
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    place, first, count = tile_of(tiles, tile)
    rows = (F + ROWS - 1) // ROWS * ROWS
    gate = data + tl.multiple_of(tl.load(offsets + place), 64)
    up = gate + BLOCK_BYTES
    PITCH: tl.constexpr = 2 * BLOCK_BYTES

    local = tl.arange(0, BLOCK_T)
    here = local < count
    token = tl.load(tokens + first + local, mask=here, other=0).to(tl.int64)
    from_row = x + token * M
    left = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    right = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, PADDED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        columns = tl.load(
            from_row[None, :] + k[:, None], mask=here[None, :] & (k < M)[:, None], other=0.0
        )
        w = weights_tile(
            gate, row, start, PADDED, rows, BITS, GROUP, ZEROS, CODE_BYTES, SCALE_BYTES, PITCH,
            BLOCK_K,
        )  # fmt: skip
        left = dot(w, columns, left, DOT_IN_FP32)
        w = weights_tile(
            up, row, start, PADDED, rows, BITS, GROUP, ZEROS, CODE_BYTES, SCALE_BYTES, PITCH,
            BLOCK_K,
        )  # fmt: skip
        right = dot(w, columns, right, DOT_IN_FP32)
    if BITS == 8:
        left = left * int8_scales(gate, row, rows, CODE_BYTES, PITCH)[:, None]
        right = right * int8_scales(up, row, rows, CODE_BYTES, PITCH)[:, None]
    e = tl.exp(-tl.abs(left))
    made = left * (tl.where(left < 0, e, 1.0) / (1.0 + e)) * right
    to = inner + (first + local).to(tl.int64)[None, :] * F + row[:, None]
    tl.store(to, made.to(tl.bfloat16), mask=here[None, :] & (row < F)[:, None])


@triton.jit(do_not_specialize=["TILES", "M", "F"])
def _experts_down_kernel(
    data,
    offsets,
    tiles,
    inner,  # [a, f] bf16
    out,  # [a, m] fp32
    TILES,
    M,
    F,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    PADDED: tl.constexpr,
    BEFORE: tl.constexpr,  # bytes of gate and up
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    tile = tl.program_id(0) % TILES
    row = tl.program_id(0) // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    place, first, count = tile_of(tiles, tile)
    rows = (M + ROWS - 1) // ROWS * ROWS
    down = data + tl.multiple_of(tl.load(offsets + place), 64) + BEFORE

    local = tl.arange(0, BLOCK_T)
    here = local < count
    assignment = (first + local).to(tl.int64)
    from_row = inner + assignment * F
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, PADDED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        columns = tl.load(
            from_row[None, :] + k[:, None], mask=here[None, :] & (k < F)[:, None], other=0.0
        )
        w = weights_tile(
            down, row, start, PADDED, rows, BITS, GROUP, ZEROS, CODE_BYTES, SCALE_BYTES,
            BLOCK_BYTES, BLOCK_K,
        )  # fmt: skip
        total = dot(w, columns, total, DOT_IN_FP32)
    if BITS == 8:
        total = total * int8_scales(down, row, rows, CODE_BYTES, BLOCK_BYTES)[:, None]
    to = out + assignment[None, :] * M + row[:, None]
    tl.store(to, total, mask=here[None, :] & (row < M)[:, None])
