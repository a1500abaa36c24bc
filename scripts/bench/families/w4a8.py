"""int8 inputs times QoQ's 4-bit weights in QServe's layout, groups of 128."""

from collections.abc import Iterator

import torch
from case import Case, Setup
from compressor_kernels.linear.w4a8 import w4a8, w4a8_ref
from families.w4a16 import FP16, SETS, cublas


def cases(setup: Setup) -> Iterator[Case]:
    outputs, inner = setup.pick((14336, 4096), (64, 256))
    weights = [
        (
            setup.bits(outputs, inner // 2, dtype=torch.int8),
            setup.rand(outputs, dtype=FP16) * 0.001,
        )
        for _ in range(SETS)
    ]
    second = {
        "s2_scales": setup.ints(1, 17, inner // 128, outputs),
        "s2_zeros": setup.ints(-120, 1, inner // 128, outputs),
    }
    for count in setup.pick((1, 16, 2048), (1, 80)):
        a = setup.ints(-127, 128, count, inner)
        yield Case(
            w4a8,
            [(a, *parts) for parts in weights],
            {"row_scales": setup.rand(count) * 0.01, **second},
            name="progressive",
            reference=w4a8_ref,
            shape=f"{count}x{outputs}x{inner}",
            peers={"cuBLAS fp16": cublas(setup, setup.randn(count, inner, dtype=FP16), outputs)},
            targets={"cuBLAS fp16": 1.5} if count == 16 else {},
        )
