"""The families of `families.py` that are bound by arithmetic: int8 and fp8 products."""

from functools import partial

import torch
from compressor_kernels.linear.w8a8 import (
    ProductTiles,
    w8a8,
    w8a8_blocks,
    w8a8_blocks_ref,
    w8a8_ref,
)
from rows import Row, gate, per_call_us
from timing import relative_error
from torch import Tensor

M, N, K, SETS = 2048, 8192, 8192, 3
SHAPE = f"{M}x{N}x{K}"
OPS = 2 * M * N * K
FP8 = torch.float8_e4m3fn
CANDIDATES = [
    ProductTiles(),
    ProductTiles(num_stages=3),
    ProductTiles(num_stages=3, persistent=True),
    ProductTiles(256, 128, 128),
    ProductTiles(128, 128, 128, num_warps=4, num_stages=3),
    ProductTiles(128, 128, 128, num_warps=8, num_stages=3),
    ProductTiles(128, 128, 128, num_warps=8, num_stages=4),
    ProductTiles(128, 128, 128, num_warps=8, num_stages=4, persistent=True),
]
EXACT_CANDIDATES = [
    ProductTiles(128, 128, 128, num_warps=4, num_stages=3),
    ProductTiles(128, 128, 128, num_warps=4, num_stages=3, halves=True),
    ProductTiles(128, 128, 128, group_m=16, num_warps=4, num_stages=3, halves=True),
    ProductTiles(128, 256, 128, num_warps=8, num_stages=3, halves=True),
    ProductTiles(128, 256, 128, num_warps=8, num_stages=4, halves=True),
    ProductTiles(256, 128, 128, num_warps=8, num_stages=4, halves=True),
    ProductTiles(128, 256, 128, num_warps=16, num_stages=3, halves=True),
    ProductTiles(64, 128, 128, num_warps=4, num_stages=3),
]


def codes(rows: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, K), dtype=torch.int8, device="cuda")
    return (torch.randn(rows, K, device="cuda") * 50).clamp(-448, 448).to(FP8)


def short(tiles: ProductTiles) -> str:
    kind = (" persistent" if tiles.persistent else "") + (" halves" if tiles.halves else "")
    shape = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    few = f" r{tiles.registers}" if tiles.registers else ""
    return f"{shape} w{tiles.num_warps} s{tiles.num_stages} g{tiles.group_m}{few}{kind}"


def tops(us: float) -> float:
    return OPS / us / 1e6


def bf16_us() -> float:
    x = [torch.randn(M, K, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    w = [torch.randn(N, K, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    return per_call_us(lambda i: torch.nn.functional.linear(x[i], w[i]), sets=2)


def int8(ceiling: float, sweep: bool) -> list[Row]:
    a, w = ([codes(n, torch.int8) for _ in range(SETS)] for n in (M, N))
    scales = {
        "row_scales": torch.rand(M, device="cuda") + 0.1,
        "column_scales": torch.rand(N, device="cuda") + 0.1,
    }
    want = w8a8_ref(a[0], w[0], **scales)
    chosen = [None, *CANDIDATES] if sweep else [None]
    theirs = per_call_us(lambda i: torch._int_mm(a[i], w[i].t()), sets=SETS)
    dense = bf16_us()
    rows = [
        Row("int8", "torch._int_mm, int32 out, no scales", SHAPE, theirs, tops(theirs), "TOP/s"),
        Row("int8", "cuBLAS bf16", SHAPE, dense, tops(dense), "TFLOP/s"),
    ]
    for tiles in chosen:
        name = "w8a8 int8, scales, bf16 out" + (f" {short(tiles)}" if tiles else "")
        call = partial(w8a8, **scales, tiles=tiles)
        if not gate(name, lambda c=call: relative_error(c(a[0], w[0]), want), 3e-3):
            continue
        us = per_call_us(lambda i, c=call: c(a[i], w[i]), sets=SETS)
        goal = None if tiles else 0.95
        rows.append(Row("int8", name, SHAPE, us, tops(us), "TOP/s", "_int_mm", theirs / us, goal))
        if not tiles:
            rows.append(
                Row("int8", name, SHAPE, us, tops(us), "TOP/s", "cuBLAS bf16", dense / us, 1.0)
            )
    return rows


def fp8(ceiling: float, sweep: bool) -> list[Row]:
    a, w = ([codes(n, FP8) for _ in range(SETS)] for n in (M, N))
    down = torch.rand(M, 1, device="cuda") * 0.01 + 0.001
    across = torch.rand(1, N, device="cuda") * 0.01 + 0.001
    scales = {"row_scales": down, "column_scales": across}
    want = w8a8_ref(a[0], w[0], **scales)
    rows = []
    for fast in (True, False):
        sums = "fast sums" if fast else "exact sums"

        def peer(i: int, fast: bool = fast) -> Tensor:
            return torch._scaled_mm(
                a[i], w[i].t(), down, across, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        theirs = per_call_us(peer, sets=SETS)
        print(f"  _scaled_mm, {sums}: error {relative_error(peer(0), want):.1e}")
        name = f"torch._scaled_mm, row-wise, {sums}"
        rows.append(Row("fp8", name, SHAPE, theirs, tops(theirs), "TFLOP/s"))
        candidates = CANDIDATES if fast else EXACT_CANDIDATES
        for tiles in [None, *candidates] if sweep else [None]:
            name = f"w8a8 fp8, {sums}" + (f" {short(tiles)}" if tiles else "")
            call = partial(w8a8, **scales, fast=fast, tiles=tiles)
            limit = 1e-2 if fast else 4e-3
            if not gate(name, lambda c=call: relative_error(c(a[0], w[0]), want), limit):
                continue
            us = per_call_us(lambda i, c=call: c(a[i], w[i]), sets=SETS)
            goal = None if tiles else 0.85
            rows.append(
                Row("fp8", name, SHAPE, us, tops(us), "TFLOP/s", "_scaled_mm", theirs / us, goal)
            )
    per_block = {
        "input_scales": torch.rand(M, K // 128, device="cuda") * 0.01,
        "weight_scales": torch.rand(N // 128, K // 128, device="cuda") * 0.01,
    }
    want = w8a8_blocks_ref(a[0], w[0], **per_block)
    name = "w8a8 fp8, blocks of 128x128"
    call = partial(w8a8_blocks, **per_block)
    if gate(name, lambda: relative_error(call(a[0], w[0]), want), 4e-3):
        us = per_call_us(lambda i: call(a[i], w[i]), sets=SETS)
        dense = bf16_us()
        rows.append(Row("fp8", name, SHAPE, us, tops(us), "TFLOP/s", "cuBLAS bf16", dense / us))
    return rows
