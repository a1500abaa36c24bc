"""Products of int8 or FP8 inputs and weights."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Call, Case, Setup
from compressor_kernels.linear.w8a8 import w8a8, w8a8_blocks, w8a8_blocks_ref, w8a8_ref

FP8 = torch.float8_e4m3fn
SETS = 3


def cases(setup: Setup) -> Iterator[Case]:
    m, n, k = setup.pick((2048, 8192, 8192), (32, 64, 256))
    x, dense = (setup.randn(rows, k) for rows in (m, n))
    cublas = Call(torch.nn.functional.linear, [(x, dense)])
    out = {"out_dtype": setup.bf16}
    case = partial(Case, shape=f"{m}x{n}x{k}", ops=2 * m * n * k)
    codes = [[setup.ints(-127, 128, rows, k) for rows in (m, n)] for _ in range(SETS)]
    yield case(
        w8a8,
        [(a, w) for a, w in codes],
        {"row_scales": setup.rand(m) * 0.01, "column_scales": setup.rand(n), **out},
        name="int8, scales, bf16 out",
        reference=w8a8_ref,
        limit=3e-3,
        peers={
            "torch._int_mm": Call(torch._int_mm, [(a, w.t()) for a, w in codes]),
            "cuBLAS bf16": cublas,
        },
        targets={"torch._int_mm": 0.95, "cuBLAS bf16": 1.0},
    )
    floats = [
        [(setup.randn(rows, k) * 50).clamp(-448, 448).to(FP8) for rows in (m, n)]
        for _ in range(SETS)
    ]
    rows, columns = (setup.rand(count) * 0.01 + 0.001 for count in (m, n))
    scales = {"row_scales": rows, "column_scales": columns, **out}
    for fast in (True, False):
        scaled = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
        sets = [(a, w.t(), rows[:, None], columns[None]) for a, w in floats]
        yield case(
            partial(w8a8, fast=fast),
            [(a, w) for a, w in floats],
            scales,
            name=f"fp8, {'fast' if fast else 'exact'} sums",
            reference=w8a8_ref,
            limit=1e-2 if fast else 4e-3,
            peers={"torch._scaled_mm": Call(torch._scaled_mm, sets, scaled)},
            targets={"torch._scaled_mm": 0.85},
        )
    yield case(
        w8a8_blocks,
        [(a, w) for a, w in floats],
        {
            "input_scales": setup.rand(m, k // 128) * 0.01,
            "weight_scales": setup.rand(-(-n // 128), k // 128) * 0.01,
            **out,
        },
        name="fp8, scales of 128 x 128",
        reference=w8a8_blocks_ref,
        limit=4e-3,
        peers={"cuBLAS bf16": cublas},
    )
