"""One-bit deltas of sixteen tenants of one linear, beside sixteen dense fp16 matrices."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, nbytes
from compressor_kernels.linear.bitdelta import delta_matmul, delta_matmul_ref

SETS = 4


def cases(setup: Setup) -> Iterator[Case]:
    tenants, inner, outer = setup.pick((16, 4096, 4096), (2, 256, 64))
    signs = [setup.bits(tenants, inner // 32, outer) for _ in range(SETS)]
    alpha = setup.rand(tenants)
    # Weights lie [out, in] in a checkpoint; `bmm` is given whichever order it is faster with.
    dense = [setup.randn(tenants, inner, outer, dtype=torch.float16) for _ in range(2)]
    turned = [w.view(tenants, outer, inner).mT for w in dense]
    for rows in setup.pick((1, 4, 16), (1, 4)):
        x = setup.randn(tenants, rows, inner, dtype=torch.float16)
        base = setup.randn(tenants, rows, outer, dtype=torch.float16)
        yield Case(
            "one bit",
            lambda i, x=x, base=base: delta_matmul(x, signs[i], alpha, base_out=base),
            partial(delta_matmul_ref, x.float(), signs[0], alpha, base_out=base),
            shape=f"{tenants}x{rows}x{outer}x{inner}",
            sets=SETS,
            moved=nbytes(signs[0], x, base, base),
            peers={
                "dense fp16": Peer(lambda i, x=x: torch.bmm(x, dense[i]), 2),
                "dense fp16, transposed": Peer(lambda i, x=x: torch.bmm(x, turned[i]), 2),
            },
        )
