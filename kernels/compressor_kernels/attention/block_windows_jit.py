"""Triton code of `block_windows`: key means, pooled forecast scores, pooled attention shares."""

import triton
import triton.language as tl

from compressor_kernels.triton.lengths_jit import text_length

# Log-sum of a tile without a visible window: finite, so that no difference of two is NaN.
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def compress_kernel(
    k_ptr,  # [B, G, T, D]
    out_ptr,  # [B, G, n, D], dense
    n,
    groups,
    k_b,
    k_g,
    k_t,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    window = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    mask = (window < n)[:, None] & (dim < D)[None, :]
    token = (window.to(tl.int64) * STRIDE)[:, None]
    base = k_ptr + lane // groups * k_b + lane % groups * k_g + dim[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(KERNEL):
        total += tl.load(base + (token + i) * k_t, mask=mask, other=0.0).to(tl.float32)
    at = (lane * n + window)[:, None] * D + dim[None, :]
    tl.store(out_ptr + at, (total / KERNEL).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forecast_kernel(
    q_ptr,  # [B, G, Tq, D]
    c_ptr,  # [B, G, n, D]
    len_ptr,  # [B] or None
    out_ptr,  # [B, G, Tq, blocks] fp32
    q_len,
    k_len,
    behind,  # tokens after the last query
    blocks,
    groups,
    q_b,
    q_g,
    q_t,
    c_b,
    c_g,
    c_n,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RATIO: tl.constexpr,  # compressed keys that start in one block
    REACH: tl.constexpr,  # compressed keys that start before a block and reach into it
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 1: one query, no matrix unit
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    b = lane // groups
    g = lane % groups
    length = text_length(len_ptr, b, k_len)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = length - behind - q_len
    position = first + row
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    last = first + tl.minimum(q_len, (tl.program_id(1) + 1) * BLOCK_M) - 1
    if tl.program_id(0) * BLOCK_B * BLOCK > last:
        return  # future blocks only: the selection never reads their scores

    n = tl.where(length < KERNEL, 0, (length - KERNEL) // STRIDE + 1)
    dim = tl.arange(0, BLOCK_D)
    q_at = q_ptr + b * q_b + g * q_g + row[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=(row < q_len)[:, None] & (dim < D)[None, :], other=0.0)
    best = tl.full([BLOCK_M, BLOCK_B], float("-inf"), tl.float32)
    for step in tl.static_range(RATIO + REACH):
        key = block * RATIO + step - REACH
        live = (key >= 0) & (key < n)
        c = tl.load(
            c_ptr + b * c_b + g * c_g + key.to(tl.int64)[:, None] * c_n + dim[None, :],
            mask=live[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        if BLOCK_M == 1:
            scores = tl.sum(c.to(tl.float32) * q.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(q, tl.trans(c))
        seen = live[None, :] & (key[None, :] * STRIDE <= position[:, None])
        best = tl.maximum(best, tl.where(seen, scores, float("-inf")))
    out_at = (lane * q_len + row[:, None]) * blocks + block[None, :]
    tl.store(out_ptr + out_at, best, mask=(row < q_len)[:, None] & (block < blocks)[None, :])


@triton.jit
def logit_kernel(
    q_ptr,  # [B, H, Tq, D]
    c_ptr,  # [B, G, n, D]
    len_ptr,  # [B] or None
    logit_ptr,  # [B, G, Tq * GROUP, n] fp32, in powers of two
    lse_ptr,  # [B, G, Tq * GROUP, tiles] fp32, log2 of the sum over one tile of windows
    q_len,
    k_len,
    behind,
    n,
    groups,
    scale,  # holds log2(e)
    q_b,
    q_h,
    q_t,
    c_b,
    c_g,
    c_n,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of one tile of windows for the query heads of a group at several tokens."""
    lane = tl.program_id(2).to(tl.int64)
    b = lane // groups
    g = lane % groups
    length = text_length(len_ptr, b, k_len)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    first = length - behind - q_len
    last = first + tl.minimum(q_len - 1, (tl.program_id(1) * BLOCK_M + BLOCK_M - 1) // GROUP)
    if tl.program_id(0) * BLOCK_N * STRIDE + KERNEL > last + 1:
        return  # no query of this tile sees a window of it: never read

    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    head = g * GROUP + row % GROUP
    in_rows = token < q_len
    q = tl.load(
        q_ptr + b * q_b + head[:, None] * q_h + token.to(tl.int64)[:, None] * q_t + dim[None, :],
        mask=in_rows[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    c = tl.load(
        c_ptr + b * c_b + g * c_g + key.to(tl.int64)[:, None] * c_n + dim[None, :],
        mask=(key < n)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    seen = (key * STRIDE + KERNEL)[None, :] <= (first + token + 1)[:, None]
    logits = tl.where(seen, tl.dot(q, tl.trans(c)) * scale, NOTHING)
    at = lane * q_len * GROUP + row
    mask = in_rows[:, None] & (key < n)[None, :]
    tl.store(logit_ptr + at[:, None] * n + key[None, :], logits, mask=mask)
    most = tl.max(logits, 1)
    total = tl.sum(tl.where(seen, tl.math.exp2(logits - most[:, None]), 0.0), 1)
    lse = tl.where(total > 0, most + tl.math.log2(tl.maximum(total, 1.0e-30)), NOTHING)
    tl.store(lse_ptr + at * tl.num_programs(0) + tl.program_id(0), lse, mask=in_rows)


@triton.jit
def share_kernel(
    logit_ptr,
    lse_ptr,
    len_ptr,
    out_ptr,  # [B, G, Tq, blocks] fp32
    q_len,
    k_len,
    behind,
    blocks,
    n,
    groups,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RATIO: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_POW2: tl.constexpr,
    TILE: tl.constexpr,  # windows in one tile of lse
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Shares of windows summed over the heads of a group, and the best of each block."""
    ROWS: tl.constexpr = BLOCK_T * GROUP_POW2
    lane = tl.program_id(2).to(tl.int64)
    length = text_length(len_ptr, lane // groups, k_len)
    first = length - behind - q_len
    last = first + tl.minimum(q_len, (tl.program_id(1) + 1) * BLOCK_T) - 1
    if tl.program_id(0) * BLOCK_B * BLOCK > last:
        return

    row = tl.arange(0, ROWS)
    token = tl.program_id(1) * BLOCK_T + row // GROUP_POW2
    member = row % GROUP_POW2
    in_rows = (token < q_len) & (member < GROUP)
    position = first + token
    at = (lane * q_len + token) * GROUP + member

    tiles = tl.cdiv(n, TILE)
    most = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in tl.range(0, tiles, 32):
        tile = base + tl.arange(0, 32)
        seen = ((tile * TILE * STRIDE + KERNEL)[None, :] <= (position + 1)[:, None]) & (
            tile < tiles
        )[None, :]
        part = tl.load(
            lse_ptr + at[:, None] * tiles + tile[None, :],
            mask=seen & in_rows[:, None],
            other=NOTHING,
        )
        most_new = tl.maximum(most, tl.max(part, 1))
        total = total * tl.math.exp2(most - most_new)
        total += tl.sum(tl.math.exp2(part - most_new[:, None]), 1)
        most = most_new
    # A row that has seen nothing sums powers of 0 = NOTHING - NOTHING; it reads no logit below.
    lse = most + tl.math.log2(tl.maximum(total, 1.0e-30))

    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    best = tl.zeros([BLOCK_T, BLOCK_B], tl.float32)
    for step in tl.static_range(RATIO + REACH):
        key = block * RATIO + step - REACH
        seen = (key >= 0)[None, :] & ((key * STRIDE + KERNEL)[None, :] <= (position + 1)[:, None])
        seen = seen & (key < n)[None, :] & in_rows[:, None]
        logits = tl.load(logit_ptr + at[:, None] * n + key[None, :], mask=seen, other=NOTHING)
        shares = tl.where(seen, tl.math.exp2(logits - lse[:, None]), 0.0)
        best = tl.maximum(best, tl.sum(tl.reshape(shares, (BLOCK_T, GROUP_POW2, BLOCK_B)), 1))
    out_token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    out_at = (lane * q_len + out_token[:, None]) * blocks + block[None, :]
    tl.store(out_ptr + out_at, best, mask=(out_token < q_len)[:, None] & (block < blocks)[None, :])
