"""Triton code of `w8a8`: tiles fetched by the bulk copy engine, 8-bit products in tensor cores."""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import e4m3_value


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles side by side, which share weights in L2."""
    down = tl.cdiv(M, BM)
    across = tl.cdiv(N, BN)
    group = tile // (GROUP_M * across)
    first = group * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    inside = tile - group * GROUP_M * across
    return first + inside % height, inside // height


@triton.jit
def _product(a, w, sums, INT8: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """sums + a wᵀ, in int32 or fp32; EXACT: what one tile adds is summed apart."""
    if INT8 and ASM:
        return tl.dot(a, w.T, sums, out_dtype=tl.int32)
    elif INT8:
        return sums + tl.dot(a.to(tl.float32), w.to(tl.float32).T).to(tl.int32)
    elif ASM and EXACT:
        return sums + tl.dot(a, w.T)
    elif ASM:
        return tl.dot(a, w.T, sums)  # the default: not at all apart
    else:
        a = e4m3_value(a.to(tl.uint8, bitcast=True), False)
        w = e4m3_value(w.to(tl.uint8, bitcast=True), False)
        return tl.dot(a, w.T, sums)


@triton.jit
def _write(y, bias_ptr, out_ptr, m, n, M, N):
    """y + bias into rows m and columns n of the result, in its dtype."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _store(
    sums,
    row_scales_ptr,
    column_scales_ptr,
    row_sums_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    row,
    column,
    M,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    if zeros_ptr is not None:  # Σ a (w − z) = Σ a w − z Σ a, in int32
        entered = tl.load(row_sums_ptr + m, mask=m < M, other=0)
        sums -= entered[:, None] * tl.load(zeros_ptr + n, mask=n < N, other=0)[None, :]
    y = sums.to(tl.float32)
    if ROWS:
        y = y * tl.load(row_scales_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    else:
        y = y * tl.load(row_scales_ptr).to(tl.float32)
    if COLUMNS:
        y = y * tl.load(column_scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    else:
        y = y * tl.load(column_scales_ptr).to(tl.float32)
    _write(y, bias_ptr, out_ptr, m, n, M, N)


@triton.jit
def _tile(
    tile, a_desc, w_desc, row_scales_ptr, column_scales_ptr, row_sums_ptr, zeros_ptr, bias_ptr,
    out_ptr, M, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, INT8: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """`product_kernel` at one tile."""
    row, column = _place(tile, M, N, BM, BN, GROUP_M)
    if HALVES:
        upper = tl.zeros((BM // 2, BN), tl.int32 if INT8 else tl.float32)
        lower = tl.zeros((BM // 2, BN), tl.int32 if INT8 else tl.float32)
        for k in tl.range(0, K, BK):
            w = w_desc.load([column * BN, k])
            a = a_desc.load([row * BM, k])
            upper = _product(a, w, upper, INT8, EXACT, ASM)
            a = a_desc.load([row * BM + BM // 2, k])
            lower = _product(a, w, lower, INT8, EXACT, ASM)
        _store(
            upper, row_scales_ptr, column_scales_ptr, row_sums_ptr, zeros_ptr, bias_ptr, out_ptr,
            2 * row, column, M, N, ROWS, COLUMNS, BM // 2, BN,
        )  # fmt: skip
        _store(
            lower, row_scales_ptr, column_scales_ptr, row_sums_ptr, zeros_ptr, bias_ptr, out_ptr,
            2 * row + 1, column, M, N, ROWS, COLUMNS, BM // 2, BN,
        )  # fmt: skip
    else:
        sums = tl.zeros((BM, BN), tl.int32 if INT8 else tl.float32)
        for k in tl.range(0, K, BK):
            a = a_desc.load([row * BM, k])
            w = w_desc.load([column * BN, k])
            sums = _product(a, w, sums, INT8, EXACT, ASM)
        _store(
            sums, row_scales_ptr, column_scales_ptr, row_sums_ptr, zeros_ptr, bias_ptr, out_ptr,
            row, column, M, N, ROWS, COLUMNS, BM, BN,
        )  # fmt: skip


@triton.jit
def product_kernel(
    a_desc,  # [M, K] in tiles of BM x BK, BM/2 x BK for HALVES
    w_desc,  # [N, K] in tiles of BN x BK
    row_scales_ptr,  # fp32 [M] or [1]
    column_scales_ptr,  # [N] or [1]
    row_sums_ptr,  # int32 [M], or None without zeros
    zeros_ptr,  # int32 [N] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    INT8: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
    STAY: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One program: one tile of the product. What tiles have past the edges is read as zeros.

    STAY    programs take tile after tile: the next is fetched as one is written
    HALVES  the halves of a tile are multiplied in turn: sums apart need half the registers
    """
    if STAY:
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, a_desc, w_desc, row_scales_ptr, column_scales_ptr, row_sums_ptr, zeros_ptr,
                bias_ptr, out_ptr, M, N, K, ROWS, COLUMNS, BM, BN, BK, GROUP_M, INT8, EXACT, ASM,
                HALVES,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a_desc, w_desc, row_scales_ptr, column_scales_ptr, row_sums_ptr,
            zeros_ptr, bias_ptr, out_ptr, M, N, K, ROWS, COLUMNS, BM, BN, BK, GROUP_M, INT8, EXACT,
            ASM, HALVES,
        )  # fmt: skip


@triton.jit
def blocks_kernel(
    a_desc,  # [M, K] in tiles of BM x BK
    w_desc,  # [N, K] in tiles of BN x BK
    input_scales_ptr,  # fp32 [M, INPUT_BLOCKS]
    weight_scales_ptr,  # [ceil(N/128), BLOCKS] if TALL, else [N, BLOCKS]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    INPUT_BLOCKS: tl.constexpr,  # BLOCKS or 1
    TALL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    INT8: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: one tile, whose part of each block of 128 inputs is scaled by itself."""
    row, column = _place(tl.program_id(0), M, N, BM, BN, GROUP_M)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    input_ptrs = input_scales_ptr + m.to(tl.int64) * INPUT_BLOCKS
    weight_ptrs = weight_scales_ptr + (n // 128 if TALL else n).to(tl.int64) * BLOCKS
    total = tl.zeros((BM, BN), tl.float32)
    for block in tl.range(0, BLOCKS):
        a = a_desc.load([row * BM, block * BK])
        w = w_desc.load([column * BN, block * BK])
        down = tl.load(input_ptrs + (block if INPUT_BLOCKS > 1 else 0), mask=m < M, other=0.0)
        across = tl.load(weight_ptrs + block, mask=n < N, other=0.0).to(tl.float32)
        none = tl.zeros((BM, BN), tl.int32 if INT8 else tl.float32)
        part = _product(a, w, none, INT8, False, ASM)
        total += part.to(tl.float32) * down.to(tl.float32)[:, None] * across[None, :]
    _write(total, bias_ptr, out_ptr, m, n, M, N)
