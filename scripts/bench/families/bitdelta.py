"""One-bit deltas of sixteen tenants of one linear, beside sixteen dense fp16 matrices."""

from collections.abc import Iterator

import torch
from case import Call, Case, Setup
from compressor_kernels.linear.bitdelta import delta_matmul, delta_matmul_ref

FP16 = torch.float16


def cases(setup: Setup) -> Iterator[Case]:
    tenants, inner, outer = setup.pick((16, 4096, 4096), (2, 256, 64))
    signs = [setup.bits(tenants, inner // 32, outer) for _ in range(4)]
    alpha = setup.rand(tenants)
    # Weights lie [out, in] in a checkpoint; `bmm` is given whichever order it is faster with.
    dense = [setup.randn(tenants, inner, outer, dtype=FP16) for _ in range(2)]
    turned = [w.view(tenants, outer, inner).mT for w in dense]
    for rows in setup.pick((1, 4, 16), (1, 4)):
        x = setup.randn(tenants, rows, inner, dtype=FP16)
        yield Case(
            delta_matmul,
            [(x, part, alpha) for part in signs],
            {"base_out": setup.randn(tenants, rows, outer, dtype=FP16)},
            name="one bit",
            reference=delta_matmul_ref,
            shape=f"{tenants}x{rows}x{outer}x{inner}",
            peers={
                "dense fp16": Call(torch.bmm, [(x, w) for w in dense]),
                "dense fp16, transposed": Call(torch.bmm, [(x, w) for w in turned]),
            },
        )
