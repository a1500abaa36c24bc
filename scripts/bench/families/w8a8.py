"""Products of int8 or FP8 inputs and weights."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup
from compressor_kernels.linear.w8a8 import w8a8, w8a8_blocks, w8a8_blocks_ref, w8a8_ref
from torch import Tensor

FP8 = torch.float8_e4m3fn
SETS = 3


def cases(setup: Setup) -> Iterator[Case]:
    m, n, k = setup.pick((2048, 8192, 8192), (32, 64, 256))
    shape, ops = f"{m}x{n}x{k}", 2 * m * n * k
    x, dense = (setup.randn(rows, k) for rows in (m, n))
    cublas = Peer(lambda i: torch.nn.functional.linear(x, dense))
    out = {"out_dtype": setup.bf16}
    scales = {"row_scales": setup.rand(m) * 0.01, "column_scales": setup.rand(n), **out}
    a8, w8 = ([setup.ints(-127, 128, rows, k) for _ in range(SETS)] for rows in (m, n))
    case = partial(Case, shape=shape, sets=SETS)
    yield case(
        "int8, scales, bf16 out",
        lambda i: w8a8(a8[i], w8[i], **scales),
        partial(w8a8_ref, a8[0], w8[0], **scales),
        limit=3e-3,
        ops=ops,
        peers={
            "torch._int_mm": Peer(lambda i: torch._int_mm(a8[i], w8[i].t()), SETS),
            "cuBLAS bf16": cublas,
        },
        targets={"torch._int_mm": 0.95, "cuBLAS bf16": 1.0},
    )
    a, w = (
        [(setup.randn(rows, k) * 50).clamp(-448, 448).to(FP8) for _ in range(SETS)]
        for rows in (m, n)
    )
    rows, columns = (setup.rand(count) * 0.01 + 0.001 for count in (m, n))
    scales = {"row_scales": rows, "column_scales": columns, **out}
    for fast in (True, False):

        def scaled_mm(i: int, fast: bool = fast) -> Tensor:
            return torch._scaled_mm(
                a[i], w[i].t(), rows[:, None], columns[None], out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )  # fmt: skip

        yield case(
            f"fp8, {'fast' if fast else 'exact'} sums",
            lambda i, fast=fast: w8a8(a[i], w[i], **scales, fast=fast),
            partial(w8a8_ref, a[0], w[0], **scales),
            limit=1e-2 if fast else 4e-3,
            ops=ops,
            peers={"torch._scaled_mm": Peer(scaled_mm, SETS)},
            targets={"torch._scaled_mm": 0.85},
        )
    blocks = {
        "input_scales": setup.rand(m, k // 128) * 0.01,
        "weight_scales": setup.rand(-(-n // 128), k // 128) * 0.01,
        **out,
    }
    yield case(
        "fp8, scales of 128 x 128",
        lambda i: w8a8_blocks(a[i], w[i], **blocks),
        partial(w8a8_blocks_ref, a[0], w[0], **blocks),
        limit=4e-3,
        ops=ops,
        peers={"cuBLAS bf16": cublas},
    )
