"""int8 inputs times QoQ's 4-bit weights in QServe's layout, groups of 128."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Setup, nbytes
from compressor_kernels.linear import w4a8 as kernel
from families.w4a16 import FP16, SETS, cublas


def cases(setup: Setup) -> Iterator[Case]:
    outputs, inner = setup.pick((14336, 4096), (64, 256))
    groups = inner // 128
    weights = [
        {
            "qweight": setup.bits(outputs, inner // 2, dtype=torch.int8),
            "s1_scales": setup.rand(outputs, dtype=FP16) * 0.001,
            "s2_scales": setup.ints(1, 17, groups, outputs),
            "s2_zeros": setup.ints(-120, 1, groups, outputs),
        }
        for _ in range(SETS)
    ]
    for count in setup.pick((1, 16, 2048), (1, 80)):
        a, scales = setup.ints(-127, 128, count, inner), setup.rand(count) * 0.01
        x = setup.randn(count, inner, dtype=FP16)
        yield Case(
            "progressive",
            lambda i, a=a, s=scales: kernel.w4a8(a, **weights[i], row_scales=s),
            partial(kernel.w4a8_ref, a, **weights[0], row_scales=scales),
            shape=f"{count}x{outputs}x{inner}",
            sets=SETS,
            moved=nbytes(*weights[0].values()),
            peers={"cuBLAS fp16": cublas(setup, x, outputs)},
            targets={"cuBLAS fp16": 1.5} if count == 16 else {},
        )
