"""Triton code of `block_cache`: who goes into which slot, and copies out of host memory."""

import triton
import triton.language as tl


@triton.jit
def place_kernel(
    wanted_ptr,  # [lanes, K] int32
    held_ptr,  # [lanes, SLOTS] int32, changed
    slot_ptr,  # [lanes, K] int32
    missing_ptr,  # [lanes * K, 3] int32
    count_ptr,  # [1] int32
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    K_POW2: tl.constexpr,
    SLOTS_POW2: tl.constexpr,
):
    lane = tl.program_id(0)
    at = tl.arange(0, K_POW2)
    slot = tl.arange(0, SLOTS_POW2)
    wanted = tl.load(wanted_ptr + lane * K + at, mask=at < K, other=-1)
    held = tl.load(held_ptr + lane * SLOTS + slot, mask=slot < SLOTS, other=-1)
    same = (held[:, None] == wanted[None, :]) & (wanted >= 0)[None, :]  # [slots, K]
    found = tl.max(tl.where(same, slot[:, None], -1), 0)
    new = (wanted >= 0) & (found < 0)
    free = (tl.max(same.to(tl.int32), 1) == 0) & (slot < SLOTS)
    # The n-th new block takes the n-th free slot.
    new_rank = tl.cumsum(new.to(tl.int32), 0)
    free_rank = tl.cumsum(free.to(tl.int32), 0)
    pair = (free_rank[:, None] == new_rank[None, :]) & free[:, None] & new[None, :]
    given = tl.max(tl.where(pair, slot[:, None], -1), 0)
    place = tl.where(new, given, found)
    tl.store(slot_ptr + lane * K + at, place, mask=at < K)
    entered = tl.max(tl.where(pair, wanted[None, :], -1), 1)
    tl.store(held_ptr + lane * SLOTS + slot, entered, mask=entered >= 0)
    fresh = tl.sum(new.to(tl.int32), 0)
    row = missing_ptr + (tl.atomic_add(count_ptr, fresh) + new_rank - 1) * 3
    tl.store(row, tl.zeros_like(wanted) + lane, mask=new)
    tl.store(row + 1, wanted, mask=new)
    tl.store(row + 2, given, mask=new)


@triton.jit
def fetch_kernel(
    host_k_ptr,  # [lanes, T, D] in pinned host memory
    host_v_ptr,
    k_ptr,  # [lanes, slots * BLOCK, D]
    v_ptr,
    missing_ptr,
    count_ptr,
    tokens,
    capacity,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_POW2: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = tl.load(count_ptr)
    inner = tl.arange(0, BLOCK_POW2)
    dim = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), count, PROGRAMS):
        lane = tl.load(missing_ptr + item * 3).to(tl.int64)
        block = tl.load(missing_ptr + item * 3 + 1)
        slot = tl.load(missing_ptr + item * 3 + 2)
        token = block * BLOCK + inner
        mask = ((inner < BLOCK) & (token < tokens))[:, None] & (dim < D)[None, :]
        source = (lane * tokens + token)[:, None] * D + dim[None, :]
        target = (lane * capacity + slot * BLOCK + inner)[:, None] * D + dim[None, :]
        k = tl.load(host_k_ptr + source, mask=mask)
        v = tl.load(host_v_ptr + source, mask=mask)
        tl.store(k_ptr + target, k, mask=mask)
        tl.store(v_ptr + target, v, mask=mask)
