"""Triton code of `head_attention`: causal prefill, split-K decode and its combine."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from compressor_kernels.attention.listed_jit import listed_tokens, token_at
from compressor_kernels.triton.lengths_jit import text_length

# Hides a key. Finite, so that a row which has seen no key yet stays free of NaN: what such a row
# accumulates is multiplied by exp2(HIDDEN - real score) = 0 as soon as it meets a visible key.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def _head_at(streaming_ptr, slot, HEADS: tl.constexpr, HEADS_POW2: tl.constexpr):
    """KV head at `slot` of the order "full heads first, each class by number", and its class."""
    head = tl.arange(0, HEADS_POW2)
    live = head < HEADS
    streams = tl.load(streaming_ptr + head, mask=live, other=0).to(tl.int32)
    full = tl.where(live, 1 - streams, 0)
    n_full = tl.sum(full, 0)
    rank = tl.where(full > 0, tl.cumsum(full, 0) - 1, n_full + tl.cumsum(streams, 0) - 1)
    here = live & (rank == slot)
    return tl.sum(tl.where(here, head, 0), 0), tl.sum(tl.where(here, streams, 0), 0)


@triton.jit
def _full_heads(streaming_ptr, HEADS: tl.constexpr, HEADS_POW2: tl.constexpr):
    head = tl.arange(0, HEADS_POW2)
    return HEADS - tl.sum(tl.load(streaming_ptr + head, mask=head < HEADS, other=0).to(tl.int32), 0)


@triton.jit
def _online_softmax(scores, m, l, acc, scale):
    """One step of softmax over key blocks in base 2; `scores` raw fp32, `scale` holds log2(e)."""
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - m_new[:, None])
    fade = tl.math.exp2(m - m_new)
    return p, m_new, l * fade + tl.sum(p, 1), acc * fade[:, None]


@triton.jit
def prefill_kernel(
    q_desc,  # [B, H, Tq, D] in tiles of BLOCK_M rows
    k_desc,  # [B, G, Tk, D] in tiles of BLOCK_N rows
    v_desc,
    out_desc,
    streaming_ptr,  # [G] bool
    q_len,
    k_len,
    batch,
    sink,
    window,
    scale,
    HEADS: tl.constexpr,  # KV heads
    HEADS_POW2: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Longest programs first: all full heads before all streaming ones, and the last query tile,
    # which sees the most keys, before the first. Heads of one tile run side by side, so that the
    # query heads of a group find each other's keys in L2.
    tiles = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    full_lanes = _full_heads(streaming_ptr, HEADS, HEADS_POW2) * GROUP * batch
    in_full = pid < full_lanes * tiles
    lanes = tl.where(in_full, full_lanes, HEADS * GROUP * batch - full_lanes)
    local = tl.where(in_full, pid, pid - full_lanes * tiles)
    tile = tiles - 1 - local // lanes
    lane = local % lanes
    slot = lane // (GROUP * batch) + tl.where(in_full, 0, full_lanes // (GROUP * batch))
    b = lane // GROUP % batch
    g, streams = _head_at(streaming_ptr, slot, HEADS, HEADS_POW2)
    h = g * GROUP + lane % GROUP

    # A full head is a streaming head without sinks whose window is longer than any text.
    sink = tl.where(streams > 0, sink, 0)
    window = tl.where(streams > 0, window, 1 << 30)

    first = tile * BLOCK_M + k_len - q_len  # position of this tile's first query
    past_diagonal = tl.cdiv(tl.minimum(first + BLOCK_M, k_len), BLOCK_N)
    diagonal = (first + 1) // BLOCK_N  # blocks before this one lie in every row's past
    window_from = tl.maximum(first - window + 1, 0) // BLOCK_N
    inside_from = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N)
    inside_from = tl.minimum(inside_from, diagonal)  # from here on, inside every row's window
    sinks = tl.minimum(tl.cdiv(sink, BLOCK_N), window_from)
    edges = inside_from - window_from
    masked = sinks + edges + past_diagonal - diagonal

    q = q_desc.load([b, h, tile * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    m = tl.full([BLOCK_M], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if OVERLAP:
        # Each block's weights meet its values one iteration later, so that this product runs on
        # the tensor cores while the next block's softmax runs on the other units.
        late = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        fade = tl.full([BLOCK_M], 1.0, tl.float32)
        for block in tl.range(inside_from, diagonal):
            k = k_desc.load([b, g, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            scores = tl.dot(q, k.T)
            before = tl.maximum(block - 1, inside_from)
            v = v_desc.load([b, g, before * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            acc = tl.dot(late.to(q.dtype), v, acc * fade[:, None])
            m_new = tl.maximum(m, tl.max(scores, 1) * scale)
            late = tl.math.exp2(scores * scale - m_new[:, None])
            fade = tl.math.exp2(m - m_new)
            l = l * fade + tl.sum(late, 1)
            m = m_new
        if inside_from < diagonal:
            v = v_desc.load([b, g, (diagonal - 1) * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            acc = tl.dot(late.to(q.dtype), v, acc * fade[:, None])
    else:
        for block in tl.range(inside_from, diagonal):
            k = k_desc.load([b, g, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            scores = tl.dot(q, k.T)
            p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
            v = v_desc.load([b, g, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc)

    row = first + tl.arange(0, BLOCK_M)[:, None]
    for step in tl.range(0, masked):
        block = tl.where(
            step < sinks,
            step,
            tl.where(
                step < sinks + edges,
                window_from + step - sinks,
                diagonal + step - sinks - edges,
            ),
        )
        k = k_desc.load([b, g, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.T)
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        scores = tl.where((key <= row) & ((key < sink) | (row - key < window)), scores, HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = v_desc.load([b, g, block * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc)

    out = (acc / l[:, None]).to(out_desc.dtype)
    out_desc.store([b, h, tile * BLOCK_M, 0], out.reshape(1, 1, BLOCK_M, BLOCK_D))


@triton.jit
def _attend_range(
    q,  # [BLOCK_G, BLOCK_D], the query heads of one KV head
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    start,
    end,
    list_ptr,  # blocks that the row's keys are those of, or None
    length,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax over the keys [start, end) of one cache row, or of its listed blocks one behind
    another: mean of values, log2 of the sum."""
    m = tl.full([BLOCK_G], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    token = tl.arange(0, BLOCK_N).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    for base in tl.range(start, end, BLOCK_N):
        place = token_at(list_ptr, base, token, end, BLOCK)
        live = (base + token < end) & (place < length)
        mask = live[:, None] & (dim < D)[None, :]
        offset = place[:, None]
        k = tl.load(k_ptr + offset * k_stride + dim[None, :], mask=mask, other=0.0)
        scores = tl.where(live[None, :], tl.dot(q, tl.trans(k)), HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = tl.load(v_ptr + offset * v_stride + dim[None, :], mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
    some = tl.maximum(l, 1.0e-30)  # an empty range has l = 0 and weighs nothing in the combine
    return acc / some[:, None], m + tl.math.log2(some)


@triton.jit
def decode_kernel(
    q_ptr,  # [B, H, D]
    kf_ptr,  # [B, full KV heads, T, D]
    vf_ptr,
    ks_ptr,  # [B, streaming KV heads, C, D]
    vs_ptr,
    full_len_ptr,  # [B] or None
    stream_len_ptr,
    heads_ptr,  # [G]: the KV head of each cache row, full rows first; None: row = head
    block_ptr,  # [B, full KV heads, K] int32, the blocks that full rows are read in, or None: all
    out_ptr,  # [B, H, D]
    part_ptr,  # [B, H, SPLITS, D] fp32, full heads only
    lse_ptr,  # [B, H, SPLITS]
    full_rows,
    stream_rows,
    full_cap,
    stream_cap,
    scale,
    q_b,
    q_h,
    kf_b,
    kf_g,
    kf_t,
    vf_b,
    vf_g,
    vf_t,
    ks_b,
    ks_g,
    ks_t,
    vs_b,
    vs_g,
    vs_t,
    batch,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    heavy = batch * full_rows * SPLITS
    in_full = pid < heavy
    lane = tl.where(in_full, pid // SPLITS, pid - heavy)
    rows = tl.where(in_full, full_rows, stream_rows)
    b = (lane // rows).to(tl.int64)
    row = (lane % rows).to(tl.int64)
    g = row
    if heads_ptr is not None:
        g = tl.load(heads_ptr + row + tl.where(in_full, 0, full_rows)).to(tl.int64)

    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    h = g * GROUP + member
    mask = (member < GROUP)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + b * q_b + h[:, None] * q_h + dim[None, :], mask=mask, other=0.0)
    lane_out = b * (full_rows + stream_rows) * GROUP + h  # row of [B, H]
    out = out_ptr + lane_out[:, None] * D + dim[None, :]

    if in_full:
        length = text_length(full_len_ptr, b, full_cap)
        split = pid % SPLITS
        listed = block_ptr
        if block_ptr is not None:
            listed = block_ptr + (b * full_rows + row) * K
        total = listed_tokens(listed, length, K, K_POW2, BLOCK)
        chunk = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N
        mean, lse = _attend_range(
            q,
            kf_ptr + b * kf_b + row * kf_g,
            vf_ptr + b * vf_b + row * vf_g,
            kf_t,
            vf_t,
            split * chunk,
            tl.minimum(total, (split + 1) * chunk),
            listed,
            length,
            scale,
            D,
            BLOCK,
            BLOCK_G,
            BLOCK_N,
            BLOCK_D,
        )
        if SPLITS == 1:
            tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            part = lane_out * SPLITS + split
            tl.store(part_ptr + part[:, None] * D + dim[None, :], mean, mask=mask)
            tl.store(lse_ptr + part, lse, mask=member < GROUP)
    else:
        length = text_length(stream_len_ptr, b, stream_cap)
        mean, lse = _attend_range(
            q,
            ks_ptr + b * ks_b + row * ks_g,
            vs_ptr + b * vs_b + row * vs_g,
            ks_t,
            vs_t,
            0,
            length,
            None,
            length,
            scale,
            D,
            BLOCK,
            BLOCK_G,
            BLOCK_N,
            BLOCK_D,
        )
        tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_splits(
    part_ptr,  # fp32 [rows, SPLITS, D], means of values
    lse_ptr,  # fp32 [rows, SPLITS], log2 of each split's sum
    out_ptr,  # [rows, D]
    row,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean of one query head over all of its splits, always in the same order."""
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * SPLITS + split, mask=split < SPLITS, other=HIDDEN)
    weight = tl.math.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    part = tl.load(
        part_ptr + (row * SPLITS + split)[:, None] * D + dim[None, :],
        mask=(split < SPLITS)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    out = tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + row * D + dim, out.to(out_ptr.dtype.element_ty), mask=dim < D)


@triton.jit
def combine_kernel(
    part_ptr,
    lse_ptr,
    heads_ptr,
    out_ptr,
    full_rows,
    total_heads,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """One program: the splits of one full query head. EARLY: the kernel before may still run."""
    if EARLY:
        gdc_wait()
    pid = tl.program_id(0)
    lane = pid // GROUP
    g = lane % full_rows
    if heads_ptr is not None:
        g = tl.load(heads_ptr + g)
    row = (lane // full_rows * total_heads + g * GROUP + pid % GROUP).to(tl.int64)
    merge_splits(part_ptr, lse_ptr, out_ptr, row, D, SPLITS, BLOCK_S, BLOCK_D)
