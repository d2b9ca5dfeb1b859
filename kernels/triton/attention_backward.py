"""Sink attention on a GPU: the backward pass.

Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.

csrc/attention/README.md derives the weight w and the shift c of each row,

    dx_ij = A_ij (w_i dout_i . v_j + c_i)        dv_j = sum_i w_i A_ij dout_i,

and the gradients of sinks and gates. Here an element-wise gate multiplies dout beforehand; then
w = 1. Where the log-sum-exp has no gradient, w goes into the exponent of A, and c / w takes the
place of c.

A first kernel makes these numbers; one walks over keys for dk and dv, with every query head of the
group, one over queries for dq. Nothing is added atomically: a call gives the same bits each time.

Source: arXiv 2602.01203, whose loss gives each head one number; out = w A v differentiated by hand.
Oracle: autograd through quernstone.attention.reference.
"""

import triton
import triton.language as tl

from quernstone.kernels.triton.attention import (
    GATED,
    GATED_BY_ELEMENT,
    LOG2E,
    SINK,
    blocks_in,
    counts_for_importance,
    dot,
    keys_of,
    load_rows,
    sequence_range,
    sigmoids,
    sink_gate,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "S", "window"])
def _sink_attention_count_kernel(
    key_start,
    key_lengths,
    token_mask,
    counts,  # [b, programs of a sequence] int32
    T,
    S,
    window,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens over which importance is the mean, BLOCK queries a program."""
    blocks = tl.cdiv(T, BLOCK)
    b = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start, end = sequence_range(key_start, key_lengths, b, S)
    row_lo, row_hi = keys_of(row + (S - T), start, end, window, CAUSAL, WINDOWED)
    counted = counts_for_importance(row, b, row_lo, row_hi, start, token_mask, T, KIND)
    tl.store(counts + tl.program_id(0), tl.sum(counted.to(tl.int32), 0))


@triton.jit(do_not_specialize=["H", "T", "S", "window", "COUNTS"])
def _sink_attention_bwd_rows_kernel(
    dout,  # [b, h, t, d]
    dlse,  # [b, h, t] fp32, contiguous, or None
    dimportance,  # [h] fp32, or None
    out,  # [b, h, t, d]
    lse,  # [b, h, t] fp32, contiguous
    gate_logit,  # [b, h, t] fp32, contiguous, or None
    sinks,
    gate,
    key_start,
    key_lengths,
    token_mask,
    counts,  # [COUNTS] int32 of the count kernel, or None
    bases,  # [b, h, t] fp32
    shifts,  # [b, h, t] fp32
    weights,  # [b, h, t] fp32; None: folded into the others
    first_shifts,  # [b, h, t] fp32, or None
    gated_dout,  # [b, h, t, d], contiguous: dout times an element-wise gate, or None
    dgate,  # as gate, contiguous, or None
    dsink_parts,  # [b, h, blocks of queries] fp32, or None
    stride_db,
    stride_dh,
    stride_dt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    H,
    T,
    S,
    COUNTS,
    window,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Weight, shift and what else a row's gates make of its incoming gradients."""
    blocks = tl.cdiv(T, BLOCK_T)
    bh = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    local = tl.arange(0, BLOCK_T)
    row = block * BLOCK_T + local
    start, end = sequence_range(key_start, key_lengths, b, S)
    row_lo, row_hi = keys_of(row + (S - T), start, end, window, CAUSAL, WINDOWED)
    inside = row < T
    sees = inside & (row_lo < row_hi)
    from_row = (block * BLOCK_T).to(tl.int64)
    at_row = bh.to(tl.int64) * T + row

    dout += b * stride_db + h * stride_dh + from_row * stride_dt
    out += b * stride_ob + h * stride_oh + from_row * stride_ot
    incoming = load_rows(dout, local, stride_dt, sees, WIDTH, D, True).to(tl.float32)
    product = incoming * load_rows(out, local, stride_ot, sees, WIDTH, D, True).to(tl.float32)
    delta = tl.sum(product, 1)
    nats = tl.load(lse + at_row, mask=sees, other=0.0)

    dgate_mean = tl.zeros((BLOCK_T,), tl.float32)
    if dimportance is not None:
        number = tl.zeros((1024,), tl.int64)
        for i in range(0, COUNTS, 1024):
            at = i + tl.arange(0, 1024)
            number += tl.load(counts + at, mask=at < COUNTS, other=0).to(tl.int64)
        tokens = tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
        counted = counts_for_importance(row, b, row_lo, row_hi, start, token_mask, T, KIND)
        dgate_mean = tl.where(counted, tl.load(dimportance + h) / tokens, 0.0)

    base = nats * LOG2E
    direct = tl.zeros((BLOCK_T,), tl.float32)
    if dlse is not None:
        direct = tl.load(dlse + at_row, mask=sees, other=0.0)
    shift = direct - delta
    if KIND == SINK:
        opened, shut = sink_gate(tl.where(sees, nats, float("-inf")), tl.load(sinks + h))
        if weights is None:
            base -= tl.log2(opened)
            shift = shut * dgate_mean - delta
        else:
            shift = direct + opened * (shut * dgate_mean - delta)
            tl.store(weights + at_row, opened, mask=inside)
        terms = tl.where(sees, shut * (delta + opened * dgate_mean), 0.0)
        tl.store(dsink_parts + bh.to(tl.int64) * blocks + block, -tl.sum(terms, 0))
    if KIND == GATED:
        at_gate = gate + b * stride_gb + h * stride_gh + from_row * stride_gt + local * stride_gt
        opened, shut = sigmoids(tl.load(at_gate, mask=inside, other=0.0).to(tl.float32))
        if weights is None:
            base -= tl.log2(opened)
            shift = tl.where(opened > 0.0, shift / opened, 0.0)
        else:
            tl.store(weights + at_row, opened, mask=inside)
        gradient = tl.where(sees, shut * (delta + opened * dgate_mean), 0.0)
        tl.store(dgate + at_row, gradient.to(dgate.dtype.element_ty), mask=inside)
    if KIND == GATED_BY_ELEMENT:
        gate += b * stride_gb + h * stride_gh + from_row * stride_gt
        logits = load_rows(gate, local, stride_gt, inside, WIDTH, D, True).to(tl.float32)
        opened, shut = sigmoids(logits)
        gradient = shut * (product + opened * (dgate_mean / WIDTH)[:, None])
        gradient = tl.where(sees[:, None], gradient, 0.0)
        first = (bh.to(tl.int64) * T + from_row) * WIDTH
        store_rows(dgate + first, local, WIDTH, inside, gradient, WIDTH, D)
        store_rows(gated_dout + first, local, WIDTH, inside, incoming * opened, WIDTH, D)
    if first_shifts is not None:
        logit = tl.load(gate_logit + at_row, mask=sees, other=0.0)
        opened, shut = sigmoids(logit)
        tl.store(first_shifts + at_row, shift - opened * dgate_mean, mask=inside)
        shift += shut * dgate_mean
    tl.store(bases + at_row, base, mask=inside)
    tl.store(shifts + at_row, shift, mask=inside)


@triton.jit
def load_numbers(base, index, present, MASKED: tl.constexpr):
    """One number a row; 0 for rows not `present`."""
    return tl.load(base + index, mask=present, other=0.0) if MASKED else tl.load(base + index)


@triton.jit
def _keys_from_rows(
    dk,
    dv,
    keys,
    values,
    q,
    dout,
    bases,
    shifts,
    weights,  # or None
    first_shifts,  # or None
    stride_qh,
    stride_qt,
    stride_dh,
    stride_dt,
    key,
    T,
    offset,
    start,
    end,
    window,
    scale,
    heads,
    first,
    head,
    skip,
    count,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    """Adds `count` blocks of queries of each head: `head` from `first` on, the rest `skip` later.

    A key outside its sequence gets anything. A row that sees nothing has zeros for its query and
    its incoming gradient, and adds none. One loop over heads and blocks, as an outer loop of its
    own would cost registers that the sums need.
    """
    local = tl.arange(0, BLOCK_T)
    for turn in range(0, heads * count):
        h = turn // count
        block = turn - h * count
        if MASKED:
            block += tl.where(block < head, 0, skip)
        from_row = (first + block) * BLOCK_T
        row = from_row + local
        row_lo, row_hi = keys_of(row + offset, start, end, window, CAUSAL, WINDOWED)
        sees = (row < T) & (row_lo < row_hi)
        h = h.to(tl.int64)
        at = h * T + from_row
        queries = load_rows(
            q + h * stride_qh + from_row.to(tl.int64) * stride_qt,
            local, stride_qt, sees, WIDTH, D, MASKED,
        )  # fmt: skip
        base = load_numbers(bases + at, local, row < T, MASKED)
        zero = tl.zeros((keys.shape[0], BLOCK_T), tl.float32)
        logits = dot(keys, tl.trans(queries), zero, DOT_IN_FP32)
        p = tl.exp2(logits * scale - base[None, :])
        if MASKED and CAUSAL:
            p = tl.where(key[:, None] <= (row + offset)[None, :], p, 0.0)
        if MASKED and WINDOWED:
            p = tl.where(key[:, None] > (row + (offset - window))[None, :], p, 0.0)
            if not CAUSAL:
                p = tl.where(key[:, None] < (row + (offset + window))[None, :], p, 0.0)
        incoming = load_rows(
            dout + h * stride_dh + from_row.to(tl.int64) * stride_dt,
            local, stride_dt, sees, WIDTH, D, MASKED,
        )  # fmt: skip
        dp = dot(values, tl.trans(incoming), zero, DOT_IN_FP32)
        shared = p
        if weights is not None:
            weight = load_numbers(weights + at, local, row < T, MASKED)[None, :]
            shared = p * weight
            dp = dp * weight
        dv = dot(shared.to(incoming.dtype), incoming, dv, DOT_IN_FP32)
        added = load_numbers(shifts + at, local, row < T, MASKED)[None, :]
        if MASKED and first_shifts is not None:
            at_first = load_numbers(first_shifts + at, local, row < T, MASKED)
            added = tl.where(key[:, None] == start, at_first[None, :], added)
        ds = p * (dp + added)
        dk = dot(ds.to(queries.dtype), queries, dk, DOT_IN_FP32)
    return dk, dv


@triton.jit(do_not_specialize=["G", "GROUP", "T", "S", "window"])
def _sink_attention_bwd_keys_kernel(
    q,
    k,
    v,
    dout,
    bases,
    shifts,
    weights,  # or None
    first_shifts,  # or None
    key_start,
    key_lengths,
    dk,  # [b, g, s, d], contiguous
    dv,  # [b, g, s, d], contiguous
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_db,
    stride_dh,
    stride_dt,
    G,
    GROUP,
    T,
    S,
    window,
    scale,
    scale_log2,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    """dk and dv of BLOCK_S keys."""
    blocks = tl.cdiv(S, BLOCK_S)
    bg = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    local = tl.arange(0, BLOCK_S)
    key = block * BLOCK_S + local
    start, end = sequence_range(key_start, key_lengths, b, S)
    offset = S - T
    earliest, _ = keys_of(offset, start, end, window, CAUSAL, WINDOWED)
    present = (key >= earliest) & (key < end)  # some query sees it

    # The queries that see a key of the block, and those that see all of them.
    from_key = tl.maximum(block * BLOCK_S, start)
    to_key = tl.minimum(block * BLOCK_S + BLOCK_S, end)
    lo = T - T
    hi = T
    whole_lo = lo
    whole_hi = hi
    if CAUSAL:
        lo = tl.maximum(lo, from_key - offset)
        whole_lo = tl.maximum(whole_lo, to_key - 1 - offset)
    elif WINDOWED:
        lo = tl.maximum(lo, from_key - window + 1 - offset)
        whole_lo = tl.maximum(whole_lo, to_key - window - offset)
    if WINDOWED:
        hi = tl.minimum(hi, to_key + window - 1 - offset)
        whole_hi = tl.minimum(whole_hi, from_key + window - offset)
    broken = to_key - from_key < BLOCK_S
    if first_shifts is not None:
        broken = broken | (from_key == start)
    whole_hi = tl.where(broken, 0, whole_hi)
    hi = tl.where(from_key < to_key, hi, 0)
    first, head, middle, tail = blocks_in(lo, hi, whole_lo, whole_hi, BLOCK_T)

    from_block = (block * BLOCK_S).to(tl.int64)
    k += b * stride_kb + g * stride_kg + from_block * stride_ks
    v += b * stride_vb + g * stride_vg + from_block * stride_vs
    keys = load_rows(k, local, stride_ks, present, WIDTH, D, True)
    values = load_rows(v, local, stride_vs, present, WIDTH, D, True)
    dk_sum = tl.zeros((BLOCK_S, D), tl.float32)
    dv_sum = tl.zeros((BLOCK_S, D), tl.float32)
    at_row = (b * G + g) * GROUP * T
    q += b * stride_qb + g * GROUP * stride_qh
    dout += b * stride_db + g * GROUP * stride_dh
    gates = weights
    if weights is not None:
        gates = weights + at_row
    firsts = first_shifts
    if first_shifts is not None:
        firsts = first_shifts + at_row
    dk_sum, dv_sum = _keys_from_rows(
        dk_sum, dv_sum, keys, values, q, dout, bases + at_row, shifts + at_row, gates, firsts,
        stride_qh, stride_qt, stride_dh, stride_dt, key, T, offset, start, end, window,
        scale_log2, GROUP, first, head, middle, head + tail, CAUSAL, WINDOWED, WIDTH, D, BLOCK_T,
        True, DOT_IN_FP32,
    )  # fmt: skip
    dk_sum, dv_sum = _keys_from_rows(
        dk_sum, dv_sum, keys, values, q, dout, bases + at_row, shifts + at_row, gates, firsts,
        stride_qh, stride_qt, stride_dh, stride_dt, key, T, offset, start, end, window,
        scale_log2, GROUP, first + head, 0, 0, middle, CAUSAL, WINDOWED, WIDTH, D, BLOCK_T,
        False, DOT_IN_FP32,
    )  # fmt: skip
    dk_sum = tl.where(present[:, None], dk_sum, 0.0)
    dv_sum = tl.where(present[:, None], dv_sum, 0.0)
    at_out = (bg.to(tl.int64) * S + from_block) * WIDTH
    store_rows(dk + at_out, local, WIDTH, key < S, dk_sum * scale, WIDTH, D)
    store_rows(dv + at_out, local, WIDTH, key < S, dv_sum, WIDTH, D)


@triton.jit
def _rows_from_keys(
    dq,
    queries,
    incoming,
    base,
    shift,
    weight,  # or None
    at_first,
    k,
    v,
    stride_k,
    stride_v,
    row_lo,
    row_hi,
    lo,
    hi,
    start,
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
    """Adds `count` blocks of keys: `head` from `first` on, the rest `skip` later."""
    column = tl.arange(0, BLOCK_S)
    for i in range(0, count):
        block = first + i
        if MASKED:
            block += tl.where(i < head, 0, skip)
        from_key = block * BLOCK_S
        key = from_key + column
        present = (key >= lo) & (key < hi)
        keys = load_rows(
            k + from_key.to(tl.int64) * stride_k, column, stride_k, present, WIDTH, D, MASKED
        )
        values = load_rows(
            v + from_key.to(tl.int64) * stride_v, column, stride_v, present, WIDTH, D, MASKED
        )
        zero = tl.zeros((queries.shape[0], BLOCK_S), tl.float32)
        logits = dot(queries, tl.trans(keys), zero, DOT_IN_FP32)
        p = tl.exp2(logits * scale - base[:, None])
        dp = dot(incoming, tl.trans(values), zero, DOT_IN_FP32)
        if weight is not None:
            dp = dp * weight[:, None]
        added = shift[:, None]
        if MASKED and FIRST_APART:
            added = tl.where(key[None, :] == start, at_first[:, None], added)
        ds = p * (dp + added)
        if MASKED:
            seen = (key[None, :] >= row_lo[:, None]) & (key[None, :] < row_hi[:, None])
            ds = tl.where(seen, ds, 0.0)
        dq = dot(ds.to(keys.dtype), keys, dq, DOT_IN_FP32)
    return dq


@triton.jit(do_not_specialize=["H", "GROUP", "T", "S", "window"])
def _sink_attention_bwd_queries_kernel(
    q,
    k,
    v,
    dout,
    bases,
    shifts,
    weights,  # or None
    first_shifts,  # or None
    key_start,
    key_lengths,
    dq,  # [b, h, t, d], contiguous
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_db,
    stride_dh,
    stride_dt,
    H,
    GROUP,
    T,
    S,
    window,
    scale,
    scale_log2,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    """dq of BLOCK_T queries."""
    blocks = tl.cdiv(T, BLOCK_T)
    bh = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    local = tl.arange(0, BLOCK_T)
    row = block * BLOCK_T + local
    start, end = sequence_range(key_start, key_lengths, b, S)
    row_lo, row_hi = keys_of(row + (S - T), start, end, window, CAUSAL, WINDOWED)
    sees = (row < T) & (row_lo < row_hi)
    bottom = block * BLOCK_T + (S - T)
    lo, whole_hi = keys_of(bottom, start, end, window, CAUSAL, WINDOWED)
    whole_lo, hi = keys_of(
        tl.minimum(bottom + BLOCK_T, S) - 1, start, end, window, CAUSAL, WINDOWED
    )
    FIRST_APART: tl.constexpr = first_shifts is not None
    if FIRST_APART:
        whole_lo = tl.maximum(whole_lo, start + 1)
    first, head, middle, tail = blocks_in(lo, hi, whole_lo, whole_hi, BLOCK_S)

    from_row = (block * BLOCK_T).to(tl.int64)
    q += b * stride_qb + h * stride_qh + from_row * stride_qt
    dout += b * stride_db + h * stride_dh + from_row * stride_dt
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg
    at_row = bh.to(tl.int64) * T + row
    queries = load_rows(q, local, stride_qt, sees, WIDTH, D, True)
    incoming = load_rows(dout, local, stride_dt, sees, WIDTH, D, True)
    base = tl.load(bases + at_row, mask=sees, other=0.0)
    shift = tl.load(shifts + at_row, mask=sees, other=0.0)
    weight = weights
    if weights is not None:
        weight = tl.load(weights + at_row, mask=sees, other=0.0)
    at_first = shift
    if FIRST_APART:
        at_first = tl.load(first_shifts + at_row, mask=sees, other=0.0)
    total = tl.zeros((BLOCK_T, D), tl.float32)
    total = _rows_from_keys(
        total, queries, incoming, base, shift, weight, at_first, k, v, stride_ks, stride_vs,
        row_lo, row_hi, lo, hi, start, scale_log2, first, head, middle, head + tail, FIRST_APART,
        WIDTH, D, BLOCK_S, True, DOT_IN_FP32,
    )  # fmt: skip
    total = _rows_from_keys(
        total, queries, incoming, base, shift, weight, at_first, k, v, stride_ks, stride_vs,
        row_lo, row_hi, lo, hi, start, scale_log2, first + head, 0, 0, middle, FIRST_APART,
        WIDTH, D, BLOCK_S, False, DOT_IN_FP32,
    )  # fmt: skip
    dq += (bh.to(tl.int64) * T + from_row) * WIDTH
    store_rows(dq, local, WIDTH, row < T, total * scale, WIDTH, D)
