"""Sink attention on a GPU: the forward pass, and what it shares with the backward pass.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.

A program holds BLOCK_T queries of one head and walks over blocks of BLOCK_S keys with the online
softmax. Query i stands at position i + S - T and sees one interval of keys. Blocks that no query
of the program sees are never loaded; blocks that every query sees whole go through a loop without
masks. Logits are kept times log2(e), so that the exponential is one instruction.

A NaN in a key that no query of the call sees stays away from every result. One in a key that only
some queries see reaches those that share a block with them: zero times NaN.

Source: "Attention Sink Forges Native MoE in Attention Layers", arXiv 2602.01203, section 3;
derivations in csrc/attention/README.md. Oracle: quernstone.attention.reference.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SINK = tl.constexpr(0)
VANILLA = tl.constexpr(1)
GATED = tl.constexpr(2)
GATED_BY_ELEMENT = tl.constexpr(3)

# Sums over queries are kept per strip of as many, whatever BLOCK_T: they do not depend on it.
STRIP = tl.constexpr(16)


@triton.jit
def sequence_range(key_start, key_lengths, b, S):
    """The keys [start, end) of a sequence, cut to the tensor: the host does not read them."""
    start = S - S
    end = S
    if key_start is not None:
        start = tl.minimum(tl.maximum(tl.load(key_start + b), 0), S).to(tl.int32)
    if key_lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), S).to(tl.int32)
    return start, end


@triton.jit
def keys_of(position, start, end, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The keys [lo, hi) that a query at `position` sees; none where lo >= hi."""
    lo = position * 0 + start
    hi = position * 0 + end
    if WINDOWED:
        lo = tl.maximum(lo, position - window + 1)
    if CAUSAL:
        hi = tl.minimum(hi, position + 1)
    elif WINDOWED:
        hi = tl.minimum(hi, position + window)
    return lo, hi


@triton.jit
def counts_for_importance(row, b, row_lo, row_hi, start, token_mask, T, KIND: tl.constexpr):
    """Whether a token has a gate (it sees a key, vanilla: beside the first) that is asked for."""
    if KIND == VANILLA:
        row_lo = tl.maximum(row_lo, start + 1)
    counted = (row < T) & (row_lo < row_hi)
    if token_mask is not None:
        marks = tl.load(token_mask + b.to(tl.int64) * T + row, mask=row < T, other=0)
        counted = counted & (marks != 0)
    return counted


@triton.jit
def load_rows(
    base, index, stride, present, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    """[rows, D] of rows `index` beyond `base`; 0 in padded channels and in rows not `present`."""
    channel = tl.arange(0, D)
    at = base + index[:, None] * stride + channel[None, :]
    if MASKED:
        if WIDTH == D:
            x = tl.load(at, mask=present[:, None], other=0.0)
        else:
            x = tl.load(at, mask=present[:, None] & (channel < WIDTH)[None, :], other=0.0)
    elif WIDTH == D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(channel < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(base, index, stride, present, x, WIDTH: tl.constexpr, D: tl.constexpr):
    channel = tl.arange(0, D)
    at = base + index[:, None] * stride + channel[None, :]
    mask = present[:, None] & (channel < WIDTH)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, DOT_IN_FP32: tl.constexpr):
    """acc + a b; DOT_IN_FP32 is for Triton's interpreter, which multiplies the bits of bf16."""
    if DOT_IN_FP32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each with all its digits."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def sink_gate(lse, sink):
    """Gate and 1 - gate of a sink; far from the logits a difference in fp32 has too few digits."""
    opened, shut = sigmoids(lse.to(tl.float64) - sink.to(tl.float64))
    blind = lse == float("-inf")
    opened = tl.where(blind, 0.0, opened.to(tl.float32))
    return opened, tl.where(blind, 1.0, shut.to(tl.float32))


@triton.jit
def blocks_in(lo, hi, whole_lo, whole_hi, BLOCK: tl.constexpr):
    """Splits [lo, hi) into blocks on the grid of BLOCK.

    Returns (first, head, middle, tail): `head` blocks from `first` on need a mask, the next
    `middle` ones lie within [whole_lo, whole_hi) and need none, the last `tail` ones do again.
    """
    first = tl.maximum(lo, 0) // BLOCK
    end = tl.maximum((tl.maximum(hi, 0) + BLOCK - 1) // BLOCK, first)
    end = tl.where(lo < hi, end, first)
    whole = tl.minimum(tl.maximum((tl.maximum(whole_lo, 0) + BLOCK - 1) // BLOCK, first), end)
    to = tl.minimum(tl.maximum(tl.maximum(whole_hi, 0) // BLOCK, whole), end)
    return first, whole - first, to - whole, end - to


@triton.jit
def _attend(
    acc,
    total,
    top,
    x,
    q,
    k,
    v,
    stride_k,
    stride_v,
    row_lo,
    row_hi,
    lo,
    hi,
    apart,
    scale,
    first,
    head,
    skip,
    count,
    FIRST_APART: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    """Online softmax over `count` blocks: `head` of them from `first` on, the rest `skip` later.

    The key `apart` goes to x, its logit, and not into the sums.
    """
    column = tl.arange(0, BLOCK_S)
    for i in range(0, count):
        block = first + i
        if MASKED:
            block += tl.where(i < head, 0, skip)
        start = block * BLOCK_S
        key = start + column
        present = (key >= lo) & (key < hi)
        keys = load_rows(
            k + start.to(tl.int64) * stride_k, column, stride_k, present, WIDTH, D, MASKED
        )
        logits = dot(q, tl.trans(keys), tl.zeros((q.shape[0], BLOCK_S), tl.float32), DOT_IN_FP32)
        if MASKED:
            if FIRST_APART:
                x += tl.sum(tl.where((key == apart)[None, :], logits, 0.0), 1) * scale
            seen = (key[None, :] >= row_lo[:, None]) & (key[None, :] < row_hi[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        raised = tl.maximum(top, tl.max(logits, 1) * scale)
        # A row that has seen nothing yet: any finite number keeps inf - inf away.
        base = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        p = tl.exp2(logits * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        values = load_rows(
            v + start.to(tl.int64) * stride_v, column, stride_v, present, WIDTH, D, MASKED
        )
        acc = dot(p.to(values.dtype), values, acc, DOT_IN_FP32)
        top = raised
    return acc, total, top, x


@triton.jit(do_not_specialize=["H", "GROUP", "T", "S", "window"])
def _sink_attention_fwd_kernel(
    q,  # [b, h, t, d]
    k,  # [b, g, s, d]
    v,  # [b, g, s, d]
    sinks,  # [h] nats, or None
    gate,  # [b, h, t] or [b, h, t, d] logits, or None
    key_start,  # [b] or None
    key_lengths,  # [b] or None
    token_mask,  # [b, t], contiguous, or None
    out,  # [b, h, t, d], contiguous
    lse,  # [b, h, t] fp32 nats, or None
    gate_logit,  # [b, h, t] fp32, or None
    gate_sums,  # [b, h, strips] fp32, or None
    counts,  # [b, strips] int32, or None
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    H,
    GROUP,
    T,
    S,
    window,
    scale,  # |scale| log2(e)
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    NEGATIVE: tl.constexpr,  # the factor on q . k is below 0
    WIDTH: tl.constexpr,
    D: tl.constexpr,  # WIDTH padded to a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    bh = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # where causal, the longest first
    b = bh // H
    h = bh % H
    g = h // GROUP
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < T
    position = row + (S - T)
    start, end = sequence_range(key_start, key_lengths, b, S)

    # The first key of the vanilla kind stays out of the running sums, else its gate is 1 - 1.
    FIRST_APART: tl.constexpr = KIND == VANILLA and (
        gate_logit is not None or gate_sums is not None
    )
    row_lo, row_hi = keys_of(position, start, end, window, CAUSAL, WINDOWED)
    sees_first = (row_lo == start) & (row_lo < row_hi)
    blind = row_lo >= row_hi
    bottom = block * BLOCK_T + (S - T)
    last = tl.minimum(bottom + BLOCK_T, S) - 1
    lo, whole_hi = keys_of(bottom, start, end, window, CAUSAL, WINDOWED)
    whole_lo, hi = keys_of(last, start, end, window, CAUSAL, WINDOWED)
    if FIRST_APART:
        row_lo = tl.maximum(row_lo, start + 1)
        whole_lo = tl.maximum(whole_lo, start + 1)
    first, head, middle, tail = blocks_in(lo, hi, whole_lo, whole_hi, BLOCK_S)

    from_row = (block * BLOCK_T).to(tl.int64)
    q += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + from_row * stride_qt
    k += b.to(tl.int64) * stride_kb + g.to(tl.int64) * stride_kg
    v += b.to(tl.int64) * stride_vb + g.to(tl.int64) * stride_vg
    local = tl.arange(0, BLOCK_T)
    queries = load_rows(q, local, stride_qt, inside, WIDTH, D, True)
    if NEGATIVE:
        queries = -queries
    acc = tl.zeros((BLOCK_T, D), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    x = tl.zeros((BLOCK_T,), tl.float32)
    acc, total, top, x = _attend(
        acc, total, top, x, queries, k, v, stride_ks, stride_vs, row_lo, row_hi, lo, hi,
        start, scale, first, head, middle, head + tail, FIRST_APART, WIDTH, D, BLOCK_S,
        True, DOT_IN_FP32,
    )  # fmt: skip
    acc, total, top, x = _attend(
        acc, total, top, x, queries, k, v, stride_ks, stride_vs, row_lo, row_hi, lo, hi,
        start, scale, first + head, 0, 0, middle, FIRST_APART, WIDTH, D, BLOCK_S,
        False, DOT_IN_FP32,
    )  # fmt: skip

    gates = tl.where(blind, 0.0, 1.0)
    at_row = bh.to(tl.int64) * T + row
    if FIRST_APART:
        logit = tl.where(sees_first, (top - x) + tl.log2(total), float("inf")) * LN2
        gates, _ = sigmoids(logit)
        if gate_logit is not None:
            tl.store(gate_logit + at_row, logit, mask=inside)
        x = tl.where(sees_first, x, float("-inf"))
        raised = tl.maximum(top, x)
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weight = tl.exp2(x - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + weight
        # Where none of these rows sees the key, it may hold NaN.
        limit = end
        if WINDOWED:
            limit = tl.where(start > bottom - window, end, start)
        channel = tl.arange(0, D)
        present = (channel < WIDTH) & (channel * 0 + start < limit)
        value = tl.load(v + start.to(tl.int64) * stride_vs + channel, mask=present, other=0.0)
        acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
        top = raised

    nats = (top + tl.log2(total)) * LN2
    nats = tl.where(blind, float("-inf"), nats)
    if lse is not None:
        tl.store(lse + at_row, nats, mask=inside)
    factor = 1.0 / tl.where(blind, 1.0, total)
    if KIND == SINK:
        gates, _ = sink_gate(nats, tl.load(sinks + h))
        factor = factor * gates
    if KIND == GATED:
        at_gate = gate + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
        at_gate += from_row * stride_gt + local * stride_gt
        gates, _ = sigmoids(tl.load(at_gate, mask=inside, other=0.0).to(tl.float32))
        factor = factor * gates
    acc = acc * factor[:, None]
    if KIND == GATED_BY_ELEMENT:
        at_gate = gate + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
        at_gate += from_row * stride_gt
        logits = load_rows(at_gate, local, stride_gt, inside, WIDTH, D, True)
        by_element, _ = sigmoids(logits.to(tl.float32))
        acc = acc * by_element
        by_element = tl.where((tl.arange(0, D) < WIDTH)[None, :], by_element, 0.0)
        gates = tl.sum(by_element, 1) / WIDTH
    # NaN or infinite values may have met a row that sees none of them.
    acc = tl.where(blind[:, None], 0.0, acc)
    out += (bh.to(tl.int64) * T + from_row) * WIDTH
    store_rows(out, local, WIDTH, inside, acc, WIDTH, D)

    if gate_sums is not None:
        counted = counts_for_importance(row, b, row_lo, row_hi, start, token_mask, T, KIND)
        strips = tl.cdiv(T, STRIP)
        strip = block * (BLOCK_T // STRIP) + tl.arange(0, BLOCK_T // STRIP)
        sums = tl.reshape(tl.where(counted, gates, 0.0), (BLOCK_T // STRIP, STRIP))
        number = tl.reshape(counted.to(tl.int32), (BLOCK_T // STRIP, STRIP))
        tl.store(gate_sums + bh.to(tl.int64) * strips + strip, tl.sum(sums, 1), mask=strip < strips)
        if h == 0:
            tl.store(
                counts + b.to(tl.int64) * strips + strip, tl.sum(number, 1), mask=strip < strips
            )


@triton.jit(do_not_specialize=["B", "H", "N"])
def _sink_attention_sum_kernel(
    parts,  # [b, h, n] fp32
    counts,  # [b, n] int32: the result is a mean over as many; None: it is the sum
    out,  # [h] fp32
    B,
    H,
    N,
    BLOCK: tl.constexpr,
):
    """Sum over b and n of each head, in one order whatever the grid was."""
    h = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, B * N, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < B * N
        at = ((i // N).to(tl.int64) * H + h) * N + i % N
        total += tl.load(parts + at, mask=inside, other=0.0).to(tl.float64)
        if counts is not None:
            number += tl.load(counts + i, mask=inside, other=0).to(tl.int64)
    result = tl.sum(total, 0)
    if counts is not None:
        result = result / tl.maximum(tl.sum(number, 0), 1).to(tl.float64)
    tl.store(out + h, result.to(tl.float32))
