"""Triton code of `block_selection`: a top-k by bisection of the scores' bits."""

import triton
import triton.language as tl

from compressor_kernels.triton.lengths_jit import text_length


@triton.jit
def top_kernel(
    score_ptr,  # [B, S, Tq, blocks] fp32
    len_ptr,  # [B] or None
    out_ptr,  # [B, S, Tq, K] int32
    q_len,
    k_len,
    behind,
    blocks,
    sets,
    init_blocks,
    local_blocks,  # -1: no block is forced
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    K_POW2: tl.constexpr,
):
    """The K best blocks of one query, ascending, then -1; of equal scores the lower block wins."""
    pid = tl.program_id(0).to(tl.int64)
    length = text_length(len_ptr, pid // q_len // sets, k_len)
    own = (length - behind - q_len + (pid % q_len).to(tl.int32)) // BLOCK
    block = tl.arange(0, BLOCKS_POW2)
    live = (block <= own) & (block < blocks)
    score = tl.load(score_ptr + pid * blocks + block, mask=live, other=float("-inf"))

    # Unsigned integers in the order of the floats (+ 0.0 makes one zero of two); forced blocks
    # come before all others.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    rank = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    forced = (block < init_blocks) | (block >= own - local_blocks)
    rank = tl.where(forced, 0xFFFFFFFF, rank).to(tl.uint32)

    # The K-th best rank, one bit at a time: the largest value that K live blocks reach.
    cut = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = cut | bit
        reach = tl.sum((live & (rank >= trial)).to(tl.int32), 0)
        cut = tl.where(reach >= K, trial, cut)
        bit = bit >> 1

    above = live & (rank > cut)
    equal = live & (rank == cut)
    room = K - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + pid * K + at, block, mask=chosen)
    slot = tl.arange(0, K_POW2)
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(out_ptr + pid * K + slot, -1, mask=(slot >= count) & (slot < K))
