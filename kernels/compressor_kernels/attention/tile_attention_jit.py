"""Triton code of `tile_attention`: lists of chosen blocks of keys, and softmax over them."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN, _online_softmax


@triton.jit
def list_kernel(
    chosen_ptr,  # [lanes, query blocks, blocks] uint8
    list_ptr,  # [lanes, query blocks, blocks] int32; anything after the last
    count_ptr,  # [lanes, query blocks] int32
    first,
    blocks,
    BLOCKS_POW2: tl.constexpr,
):
    """The chosen blocks of one block of queries, ascending, up to its own."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    block = tl.arange(0, BLOCKS_POW2)
    live = (block < blocks) & (block <= first + tl.program_id(0))
    wanted = tl.load(chosen_ptr + row * blocks + block, mask=live, other=0) != 0
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(list_ptr + row * blocks + place, block, mask=wanted)
    tl.store(count_ptr + row, tl.sum(wanted.to(tl.int32), 0))


@triton.jit
def tile_prefill_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_desc,  # [B, G, T, D] in tiles of BLOCK_N rows
    v_desc,
    list_ptr,  # [B, H, query blocks, blocks] int32, ascending, the own block last
    count_ptr,  # [B, H, query blocks] int32
    out_ptr,  # [B, H, Tq, D], dense
    q_len,
    k_len,
    first,
    blocks,
    heads,
    scale,  # holds log2(e)
    q_b,
    q_h,
    q_t,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head. The heads of a block run side by side, so that those of a
    KV head find each other's keys in L2; later blocks, which have more to do, go first."""
    lane = tl.program_id(0).to(tl.int64)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    g = h // GROUP
    own = first + number
    position = own * BLOCK + tl.arange(0, BLOCK)
    token = position - (k_len - q_len)
    dim = tl.arange(0, BLOCK_D)
    mask = ((token >= 0) & (token < q_len))[:, None] & (dim < D)[None, :]
    q_at = q_ptr + lane // heads * q_b + lane % heads * q_h + dim[None, :]
    q = tl.load(q_at + token[:, None].to(tl.int64) * q_t, mask=mask, other=0.0)
    listed = list_ptr + (lane * tl.num_programs(1) + number) * blocks
    count = tl.load(count_ptr + lane * tl.num_programs(1) + number)
    steps: tl.constexpr = BLOCK // BLOCK_N
    inner = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # Every block but the last lies in all rows' past. A tile's weights meet its values one step
    # later, so that this product runs on the tensor cores during the next softmax.
    late = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    fade = tl.full([BLOCK], 1.0, tl.float32)
    before = tl.load(listed) * BLOCK
    for step in tl.range(0, (count - 1) * steps):
        at = tl.load(listed + step // steps) * BLOCK + step % steps * BLOCK_N
        k = k_desc.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.T)
        v = v_desc.load([b, g, before, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(late.to(q.dtype), v, acc * fade[:, None])
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        late = tl.math.exp2(scores * scale - m_new[:, None])
        fade = tl.math.exp2(m - m_new)
        l = l * fade + tl.sum(late, 1)
        m = m_new
        before = at
    if count > 1:
        v = v_desc.load([b, g, before, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(late.to(q.dtype), v, acc * fade[:, None])
    for step in tl.range(0, steps):
        at = own * BLOCK + step * BLOCK_N
        k = k_desc.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.where((at + inner)[None, :] <= position[:, None], tl.dot(q, k.T), HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = v_desc.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc)
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    out = out_ptr + (lane * q_len + token)[:, None] * D + dim[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)
