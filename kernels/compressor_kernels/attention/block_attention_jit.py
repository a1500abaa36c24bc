"""Triton code of `block_attention`: softmax over the tokens of chosen blocks."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from compressor_kernels.attention.head_attention_jit import HIDDEN, _online_softmax
from compressor_kernels.triton.lengths_jit import text_length


@triton.jit
def _chosen(block_ptr, K: tl.constexpr):
    """How many of K block numbers come before the first -1, by halves: all of them at once would
    take the registers of a whole program."""
    low = 0
    high = K
    while low < high:
        middle = (low + high) // 2
        if tl.load(block_ptr + middle) < 0:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def attend_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    block_ptr,  # [B, S, Tq, K] int32, ascending, then -1
    len_ptr,  # [B] or None
    out_ptr,  # [B, H, Tq, D], dense
    part_ptr,  # [B, H, SPLITS, D] fp32, or None where nothing is split
    lse_ptr,  # [B, H, SPLITS]
    k_len,
    q_len,
    sets,
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
    GROUP: tl.constexpr,  # query heads of one set
    PER_KEY: tl.constexpr,  # sets of one KV head
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token's query heads of one set over one range of its chosen blocks. EARLY: the kernel
    that combines ranges may start, and waits."""
    if EARLY:
        gdc_launch_dependents()
    lane = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    token = tl.program_id(0) // SPLITS
    b = lane // sets
    s = lane % sets
    g = s // PER_KEY
    length = text_length(len_ptr, b, k_len)
    position = length - q_len + token

    row = (lane * q_len + token) * K
    count = K
    if tl.load(block_ptr + row + K - 1) < 0:
        count = _chosen(block_ptr + row, K)
    # A split is a range of tokens of the chosen blocks put one behind another, in whole tiles.
    chunk = tl.cdiv(tl.cdiv(count * BLOCK, SPLITS), BLOCK_N) * BLOCK_N
    start = split * chunk
    end = tl.minimum(count * BLOCK, start + chunk)

    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    h = s * GROUP + member
    mask = (member < GROUP)[:, None] & (dim < D)[None, :]
    q_at = q_ptr + b * q_b + h[:, None] * q_h + token.to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + g * k_g + dim[None, :]
    v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
    m = tl.full([BLOCK_G], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    inner = tl.arange(0, BLOCK_N)
    for base in tl.range(start, end, BLOCK_N):
        if BLOCK % BLOCK_N == 0:  # a tile lies in one block
            block = tl.load(block_ptr + row + base // BLOCK)
            offset = base % BLOCK + inner
            live = block * BLOCK + offset <= position
        else:
            flat = base + inner
            inside = flat < end
            block = tl.load(block_ptr + row + flat // BLOCK, mask=inside, other=0)
            offset = flat % BLOCK
            live = inside & (block * BLOCK + offset <= position)
        at = block.to(tl.int64) * BLOCK + offset
        tile = live[:, None] & (dim < D)[None, :]
        k = tl.load(k_base + at[:, None] * k_t, mask=tile, other=0.0)
        scores = tl.where(live[None, :], tl.dot(q, tl.trans(k)), HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = tl.load(v_base + at[:, None] * v_t, mask=tile, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
    some = tl.maximum(l, 1.0e-30)  # an empty range has l = 0 and weighs nothing in the combine
    mean = acc / some[:, None]
    head = b * sets * GROUP + h
    if SPLITS == 1:
        out = out_ptr + (head * q_len + token)[:, None] * D + dim[None, :]
        tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = head * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + dim[None, :], mean, mask=mask)
        tl.store(lse_ptr + part, m + tl.math.log2(some), mask=member < GROUP)


@triton.jit
def tile_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    list_ptr,  # [B, S, tiles, blocks] int32: blocks that any token of a tile chose come first
    bits_ptr,  # the same shape, int64: which tokens of the tile chose it
    count_ptr,  # [B, S, tiles] int32: how many those are
    len_ptr,  # [B] or None
    out_ptr,  # [B, H, Tq, D], dense
    k_len,
    q_len,
    sets,
    blocks,
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
    GROUP_POW2: tl.constexpr,
    PER_KEY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The query heads of one set at TILE neighbouring tokens, over all that any of them chose."""
    ROWS: tl.constexpr = TILE * GROUP_POW2
    tiles = tl.num_programs(0)
    # Later tiles have more blocks: they go first.
    tile = tiles - 1 - tl.program_id(0)
    lane = tl.program_id(1).to(tl.int64)
    b = lane // sets
    s = lane % sets
    g = s // PER_KEY
    length = text_length(len_ptr, b, k_len)
    row = tl.arange(0, ROWS)
    token = tile * TILE + row // GROUP_POW2
    member = row % GROUP_POW2
    position = length - q_len + token
    h = s * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    mask = ((member < GROUP) & (token < q_len))[:, None] & (dim < D)[None, :]
    q_at = q_ptr + b * q_b + h[:, None] * q_h + token[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + g * k_g + dim[None, :]
    v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
    own_bit = (row // GROUP_POW2).to(tl.int64)
    listed = list_ptr + (lane * tiles + tile) * blocks
    bits = bits_ptr + (lane * tiles + tile) * blocks
    count = tl.load(count_ptr + lane * tiles + tile)

    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    inner = tl.arange(0, BLOCK_N)
    for step in tl.range(0, count * (BLOCK // BLOCK_N)):
        block = tl.load(listed + step // (BLOCK // BLOCK_N))
        mine = (tl.load(bits + step // (BLOCK // BLOCK_N)) >> own_bit) & 1
        key = block * BLOCK + step % (BLOCK // BLOCK_N) * BLOCK_N + inner
        some = (key < length)[:, None] & (dim < D)[None, :]
        at = key[:, None].to(tl.int64)
        k = tl.load(k_base + at * k_t, mask=some, other=0.0)
        seen = (mine[:, None] > 0) & (key[None, :] <= position[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k)), HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = tl.load(v_base + at * v_t, mask=some, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
    # A row of no token may have seen nothing; it is not stored.
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    head = b * sets * GROUP + h
    out = out_ptr + (head * q_len + token)[:, None] * D + dim[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)
