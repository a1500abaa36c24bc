"""Triton code of `block_routing`: mean keys, gates and their best, queries by block, attention by
block, and its merge."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN, _online_softmax


@triton.jit
def mean_kernel(
    k_ptr,  # [B, G, T, D]
    out_ptr,  # [B, G, blocks, D] fp32
    k_len,
    groups,
    k_b,
    k_g,
    k_t,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block's mean key."""
    block = tl.program_id(0)
    lane = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    base = k_ptr + lane // groups * k_b + lane % groups * k_g + dim[None, :]
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, BLOCK, ROWS):
        inner = start + tl.arange(0, ROWS)
        key = block * BLOCK + inner
        mask = ((inner < BLOCK) & (key < k_len))[:, None] & (dim < D)[None, :]
        k = tl.load(base + key[:, None].to(tl.int64) * k_t, mask=mask, other=0.0)
        total += tl.sum(k.to(tl.float32), 0)
    mean = total / tl.minimum(BLOCK, k_len - block * BLOCK)
    out = out_ptr + (lane * tl.num_programs(0) + block) * D + dim
    tl.store(out, mean, mask=dim < D)


@triton.jit
def gate_kernel(
    q_ptr,  # [B, H, Tq, D]
    mean_ptr,  # [B, G, blocks, D], dense
    out_ptr,  # [B, H, Tq, K] int32
    q_len,
    k_len,
    blocks,
    heads,
    q_b,
    q_h,
    q_t,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS queries of one head: their own blocks, and the K - 1 best of those before.

    Of every CHUNK of blocks the best K - 1 are taken one by one, and each takes the place of the
    worst that is held if it is better. Blocks ascend, so that of equal gates the lower one stays.
    """
    lane = tl.program_id(1).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    b = lane // heads
    h = lane % heads
    g = b * (heads // GROUP) + h // GROUP
    token = tile * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    mask = (token < q_len)[:, None] & (dim < D)[None, :]
    q_at = q_ptr + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    mean_base = mean_ptr + g * blocks * D + dim[:, None]
    own = (k_len - q_len + token) // BLOCK
    past = (k_len - q_len + tl.minimum(tile * ROWS + ROWS, q_len) - 1) // BLOCK

    # Empty places hold numbers below 0, all different; those from K - 1 on are never given away.
    slot = tl.arange(0, K_POW2)[None, :]
    held = tl.where(slot < K - 1, float("-inf"), float("inf")) + tl.zeros([ROWS, 1], tl.float32)
    ids = tl.zeros([ROWS, 1], tl.int32) - 1 - slot
    for start in tl.range(0, past, CHUNK):
        block = start + tl.arange(0, CHUNK)
        some = (block < blocks)[None, :] & (dim < D)[:, None]
        mean = tl.load(mean_base + block[None, :] * D, mask=some, other=0.0)
        gate = tl.where(block[None, :] < own[:, None], tl.dot(q, mean), float("-inf"))
        for _ in tl.range(0, K - 1):
            best = tl.max(gate, 1)
            at = tl.min(tl.where(gate == best[:, None], block[None, :], 0x7FFFFFFF), 1)
            gate = tl.where(block[None, :] == at[:, None], float("-inf"), gate)
            worst = tl.min(held, 1)
            leaves = tl.max(tl.where(held == worst[:, None], ids, -0x7FFFFFFF), 1)
            given = (ids == leaves[:, None]) & (best > worst)[:, None]
            held = tl.where(given, best[:, None], held)
            ids = tl.where(given, at[:, None], ids)
    ids = tl.where(slot == K - 1, own[:, None], ids)
    ids = tl.sort(tl.where(ids < 0, 0x7FFFFFFF, ids), dim=1)
    out = out_ptr + (lane * q_len + token)[:, None] * K + slot
    found = tl.where(ids == 0x7FFFFFFF, -1, ids)
    tl.store(out, found, mask=(token < q_len)[:, None] & (slot < K))


@triton.jit
def rank_kernel(
    block_ptr,  # [lanes, choices] int32, -1 for none
    tally_ptr,  # [lanes, blocks, runs] int32, zeros before
    rank_ptr,  # [lanes, choices] int32
    choices,
    blocks,
    PER: tl.constexpr,
):
    """The place of each of PER choices among those of the same block, and how many these are."""
    lane = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0)
    choice = run * PER + tl.arange(0, PER)
    at = lane * choices + choice
    block = tl.load(block_ptr + at, mask=choice < choices, other=-1)
    tally = tally_ptr + (lane * blocks + block) * tl.num_programs(0) + run
    rank = tl.atomic_add(tally, 1, mask=block >= 0, sem="relaxed")
    tl.store(rank_ptr + at, rank, mask=block >= 0)


@triton.jit
def place_kernel(
    block_ptr,  # [lanes, choices] int32
    start_ptr,  # [lanes, blocks, runs] int32, over all lanes
    rank_ptr,  # [lanes, choices] int32
    entry_ptr,  # [lanes, choices] int32
    choices,
    blocks,
    PER: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    runs = tl.num_programs(0)
    choice = tl.program_id(0) * PER + tl.arange(0, PER)
    block = tl.load(block_ptr + lane * choices + choice, mask=choice < choices, other=-1)
    real = block >= 0
    starts = start_ptr + lane * blocks * runs
    start = tl.load(starts + block.to(tl.int64) * runs + tl.program_id(0), mask=real, other=0)
    rank = tl.load(rank_ptr + lane * choices + choice, mask=real, other=0)
    tl.store(entry_ptr + lane * choices + start - tl.load(starts) + rank, choice, mask=real)


@triton.jit
def gather_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    entry_ptr,  # [lanes, Tq * K] int32: query * K + slot, by block
    offset_ptr,  # [lanes, blocks] int32
    count_ptr,  # [lanes, blocks] int32
    end_ptr,  # [lanes, blocks] int32: spans up to and with each block's
    block_ptr,  # [lanes, spans] int32: the block of a span
    part_ptr,  # [lanes, Tq * K, D]
    lse_ptr,  # [lanes, Tq * K] fp32
    q_len,
    k_len,
    blocks,
    first,  # of all heads, the first of those that are here
    here,  # heads of a batch row that are here
    scale,  # holds log2(e)
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Up to SPAN of the queries that chose one block, ROWS at a time, over its keys; a block of
    BLOCK_N is read once for all of them."""
    lane = tl.program_id(1).to(tl.int64)
    span = tl.program_id(0)
    block = tl.load(block_ptr + lane * tl.num_programs(0) + span)
    if block < blocks:
        count = tl.load(count_ptr + lane * blocks + block)
        before = tl.load(end_ptr + lane * blocks + block) - (count + SPAN - 1) // SPAN
        b = lane // here
        h = first + lane % here
        g = h // GROUP
        entries = q_len * K
        listed = entry_ptr + lane * entries + tl.load(offset_ptr + lane * blocks + block)
        dim = tl.arange(0, BLOCK_D)
        inner = tl.arange(0, BLOCK_N)
        q_base = q_ptr + b * q_b + h * q_h + dim[None, :]
        k_base = k_ptr + b * k_b + g * k_g + dim[:, None]
        v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
        key = block * BLOCK + inner
        far = key.to(tl.int64)
        some_k = (key < k_len)[None, :] & (dim < D)[:, None]
        some_v = (key < k_len)[:, None] & (dim < D)[None, :]
        k = tl.load(k_base + far[None, :] * k_t, mask=some_k, other=0.0)
        v = tl.load(v_base + far[:, None] * v_t, mask=some_v, other=0.0)
        begin = (span - before) * SPAN
        for start in tl.range(begin, tl.minimum(count, begin + SPAN), ROWS):
            row = start + tl.arange(0, ROWS)
            real = row < count
            entry = tl.load(listed + row, mask=real, other=0)
            token = entry // K
            position = k_len - q_len + token
            mask = real[:, None] & (dim < D)[None, :]
            q = tl.load(q_base + token[:, None].to(tl.int64) * q_t, mask=mask, other=0.0)
            scores = tl.where(key[None, :] <= position[:, None], tl.dot(q, k), HIDDEN)
            m = tl.max(scores, 1) * scale
            p = tl.math.exp2(scores * scale - m[:, None])
            l = tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v)
            for step in tl.static_range(1, BLOCK // BLOCK_N):
                later = key + step * BLOCK_N
                at = later.to(tl.int64)
                live = (later < k_len)[None, :] & (dim < D)[:, None]
                more_k = tl.load(k_base + at[None, :] * k_t, mask=live, other=0.0)
                more = tl.dot(q, more_k)
                more = tl.where(later[None, :] <= position[:, None], more, HIDDEN)
                p, m, l, acc = _online_softmax(more, m, l, acc, scale)
                live = (later < k_len)[:, None] & (dim < D)[None, :]
                more_v = tl.load(v_base + at[:, None] * v_t, mask=live, other=0.0)
                acc = tl.dot(p.to(v.dtype), more_v, acc)
            where = lane * entries + entry
            mean = acc / l[:, None]
            out = part_ptr + where[:, None] * D + dim[None, :]
            tl.store(out, mean.to(part_ptr.dtype.element_ty), mask=mask)
            tl.store(lse_ptr + where, m + tl.math.log2(l), mask=real)


@triton.jit
def merge_kernel(
    part_ptr,  # [lanes, Tq, K, D]
    lse_ptr,  # [lanes, Tq, K] fp32; HIDDEN where a slot holds no block
    out_ptr,  # [B, H, Tq, D], dense
    q_len,
    heads,
    first,
    here,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS queries of one head: their blocks together, always in the same order."""
    lane = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < q_len
    dim = tl.arange(0, BLOCK_D)
    row = (lane * q_len + token) * K
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for slot in tl.range(0, K):
        lse = tl.load(lse_ptr + row + slot, mask=live, other=HIDDEN)
        there = lse > HIDDEN * 0.5
        some = there[:, None] & (dim < D)[None, :]
        part = tl.load(part_ptr + (row + slot)[:, None] * D + dim[None, :], mask=some, other=0.0)
        m_new = tl.maximum(m, lse)
        fade = tl.math.exp2(m - m_new)
        weight = tl.where(there, tl.math.exp2(lse - m_new), 0.0)
        acc = acc * fade[:, None] + part.to(tl.float32) * weight[:, None]
        l = l * fade + weight
        m = m_new
    head = lane // here * heads + first + lane % here
    out = out_ptr + (head * q_len + token)[:, None] * D + dim[None, :]
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dim < D)[None, :])
