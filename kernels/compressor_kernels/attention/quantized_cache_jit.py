"""Triton code of `quantized_cache`: split-K decoding over 8-bit and 4-bit keys and values, and its
merge. One program: the query heads of one KV head over one range of keys."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN, merge_splits
from compressor_kernels.attention.listed_jit import listed_tokens, token_at
from compressor_kernels.triton.lengths_jit import text_length
from compressor_kernels.triton.rounding_jit import e4m3_value


@triton.jit
def _range(total, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    chunk = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N
    start = tl.program_id(1) * chunk
    return start, tl.minimum(total, start + chunk)


@triton.jit
def _fold(scores, m, l, live):
    """One step of softmax in base 2: weights, and what came before fades by."""
    scores = tl.where(live[None, :], scores, HIDDEN)
    top = tl.maximum(m, tl.max(scores, 1))
    p = tl.math.exp2(scores - top[:, None])
    p = tl.where(live[None, :], p, 0.0)
    fade = tl.math.exp2(m - top)
    return p, top, l * fade + tl.sum(p, 1), fade


@triton.jit
def kv8_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # int8, or E4M3 as uint8 [B, G, T, D]
    v_ptr,
    k_scales_ptr,  # fp32 [G]
    v_scales_ptr,
    lengths_ptr,  # int32 [B] or None
    block_ptr,  # int32 [B, G, K], the blocks that are read, or None: all
    parts_ptr,  # fp32 [B, H, SPLITS, D]
    weights_ptr,  # fp32 [B, H, SPLITS], log2 of each range's sum
    T,
    scale,  # holds log2(e)
    D: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    b = lane // G
    dtype: tl.constexpr = q_ptr.dtype.element_ty if ASM else tl.float32
    vtype: tl.constexpr = tl.float16 if ASM else tl.float32  # weights keep more bits than in bf16
    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    head = lane * GROUP + member  # of [B, H]
    mine = member < GROUP
    q = tl.load(q_ptr + head[:, None] * D + dim[None, :], mask=mine[:, None] & (dim < D)[None, :],
                other=0.0).to(dtype)  # fmt: skip
    scale = scale * tl.load(k_scales_ptr + lane % G)
    length = text_length(lengths_ptr, b, T)
    listed = block_ptr
    if block_ptr is not None:
        listed = block_ptr + lane * K
    start, end = _range(listed_tokens(listed, length, K, K_POW2, BLOCK), SPLITS, BLOCK_N)
    m = tl.full([BLOCK_G], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    token = tl.arange(0, BLOCK_N)
    for base in tl.range(start, end, BLOCK_N):
        place = token_at(listed, base, token, end, BLOCK)
        live = (base + token < end) & (place < length)
        at = (lane * T + place)[:, None] * D + dim[None, :]
        inside = live[:, None] & (dim < D)[None, :]
        k = _value(tl.load(k_ptr + at, mask=inside, other=0), dtype, FP8, ASM)
        p, m, l, fade = _fold(tl.dot(q, tl.trans(k)) * scale, m, l, live)
        v = _value(tl.load(v_ptr + at, mask=inside, other=0), vtype, FP8, ASM)
        acc = tl.dot(p.to(vtype), v, acc * fade[:, None])
    acc = acc * tl.load(v_scales_ptr + lane % G)
    _leave(acc, m, l, head, mine, dim, parts_ptr, weights_ptr, D, SPLITS)


@triton.jit
def _value(codes, dtype: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    if FP8 and ASM:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif FP8:
        return e4m3_value(codes, False)
    else:
        return codes.to(dtype)


@triton.jit
def kv4_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # uint8 [B, G, T, D/2]
    v_ptr,
    k_params_ptr,  # fp16 [B, G, T, 2] as int32 [B, G, T]
    v_params_ptr,
    lengths_ptr,
    block_ptr,
    parts_ptr,
    weights_ptr,
    T,
    scale,
    D: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
):
    """Even and odd channels are two products, so that bytes stay where they are."""
    HALF: tl.constexpr = BLOCK_D // 2
    lane = tl.program_id(0).to(tl.int64)
    b = lane // G
    dtype: tl.constexpr = q_ptr.dtype.element_ty if ASM else tl.float32
    # A weight times a step keeps more bits in fp16, in which codes are exact.
    vtype: tl.constexpr = tl.float16 if ASM else tl.float32
    member = tl.arange(0, BLOCK_G)
    pair = tl.arange(0, HALF)
    head = lane * GROUP + member
    mine = member < GROUP
    q_ptrs = q_ptr + head[:, None] * D + 2 * pair[None, :]
    mine_inside = mine[:, None] & (pair < D // 2)[None, :]
    even = tl.load(q_ptrs, mask=mine_inside, other=0.0).to(dtype)
    odd = tl.load(q_ptrs + 1, mask=mine_inside, other=0.0).to(dtype)
    q_sum = tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)
    length = text_length(lengths_ptr, b, T)
    listed = block_ptr
    if block_ptr is not None:
        listed = block_ptr + lane * K
    start, end = _range(listed_tokens(listed, length, K, K_POW2, BLOCK), SPLITS, BLOCK_N)
    m = tl.full([BLOCK_G], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    zeros = tl.zeros([BLOCK_G], tl.float32)
    acc_even = tl.zeros([BLOCK_G, HALF], tl.float32)
    acc_odd = tl.zeros([BLOCK_G, HALF], tl.float32)
    token = tl.arange(0, BLOCK_N)
    for base in tl.range(start, end, BLOCK_N):
        place = token_at(listed, base, token, end, BLOCK)
        live = (base + token < end) & (place < length)
        row = lane * T + place
        at = row[:, None] * (D // 2) + pair[None, :]
        inside = live[:, None] & (pair < D // 2)[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0)
        step, zero = _params(k_params_ptr, row, live)
        scores = tl.dot(even, tl.trans(_nibble(k, 0, dtype)))
        scores = tl.dot(odd, tl.trans(_nibble(k, 4, dtype)), scores)
        scores = scores * step[None, :] - q_sum[:, None] * zero[None, :]
        p, m, l, fade = _fold(scores * scale, m, l, live)
        v = tl.load(v_ptr + at, mask=inside, other=0)
        step, zero = _params(v_params_ptr, row, live)
        weight = (p * step[None, :]).to(vtype)
        acc_even = tl.dot(weight, _nibble(v, 0, vtype), acc_even * fade[:, None])
        acc_odd = tl.dot(weight, _nibble(v, 4, vtype), acc_odd * fade[:, None])
        zeros = zeros * fade + tl.sum(p * zero[None, :], 1)
    _leave(acc_even - zeros[:, None], m, l, head, mine, 2 * pair, parts_ptr, weights_ptr, D, SPLITS)
    _leave(acc_odd - zeros[:, None], m, l, head, mine, 2 * pair + 1, parts_ptr, weights_ptr, D,
           SPLITS)  # fmt: skip


@triton.jit
def _nibble(bytes, shift: tl.constexpr, dtype: tl.constexpr):
    """A number beside the bits of 1024 in fp16, or of 128 in bf16, is their sum."""
    codes = (bytes >> shift) & 15
    if dtype == tl.float16:
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    elif dtype == tl.bfloat16:
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 128.0
    else:
        return codes.to(dtype)


@triton.jit
def _params(ptr, row, live):
    """Step and zero of tokens, fp32; read as one word, wide enough for an asynchronous copy."""
    words = tl.load(ptr + row, mask=live, other=0)
    step = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return step, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _leave(
    acc, m, l, head, mine, dim, parts_ptr, weights_ptr, D: tl.constexpr, SPLITS: tl.constexpr
):
    """A range's mean of values and the logarithm of its weight; an empty one weighs nothing."""
    some = tl.maximum(l, 1.0e-30)
    row = head * SPLITS + tl.program_id(1)
    inside = mine[:, None] & (dim < D)[None, :]
    tl.store(parts_ptr + row[:, None] * D + dim[None, :], acc / some[:, None], mask=inside)
    tl.store(weights_ptr + row, m + tl.math.log2(some), mask=mine)


@triton.jit
def merge_kernel(
    parts_ptr,
    weights_ptr,
    out_ptr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the ranges of one query head."""
    row = tl.program_id(0).to(tl.int64)
    merge_splits(parts_ptr, weights_ptr, out_ptr, row, D, SPLITS, BLOCK_S, BLOCK_D)
