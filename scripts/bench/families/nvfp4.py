"""Float inputs times NVFP4 weights."""

from collections.abc import Iterator

import torch
from case import Call, Case, Setup
from compressor_kernels.linear.nvfp4 import nvfp4_matmul, nvfp4_matmul_ref
from compressor_kernels.linear.w4a16 import w4a16
from families.w4a16 import FP16, GROUPS, SETS, cublas, int4


def cases(setup: Setup) -> Iterator[Case]:
    outputs, inner = setup.pick((14336, 4096), (64, 256))
    plain = int4(setup, outputs, inner)
    weights = [
        (
            setup.bits(outputs, inner // 2, dtype=torch.uint8),
            (setup.rand(outputs, inner // 16) * 448).to(torch.float8_e4m3fn),
            torch.full((1,), 1e-5, device=setup.device),
        )
        for _ in range(SETS)
    ]
    for count in setup.pick((1, 16, 64, 2048), (1, 70)):
        x = setup.randn(count, inner, dtype=FP16)
        ours = Call(w4a16, [(x, *parts) for parts in plain], GROUPS)
        yield Case(
            nvfp4_matmul,
            [(x, *parts) for parts in weights],
            name="weights only",
            reference=nvfp4_matmul_ref,
            shape=f"{count}x{outputs}x{inner}",
            limit=2e-3,
            peers={"our W4A16": ours, "cuBLAS fp16": cublas(setup, x, outputs)},
            targets={"our W4A16": 0.8} if count == 1 else {},
        )
