"""Few tokens times int4 weights, and many."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, nbytes
from compressor_kernels.linear import w4a16 as kernel
from torch import Tensor
from torch.nn.functional import linear

FP16, SETS = torch.float16, 8
WIDE = [(14336, 4096), (4096, 14336)]
OTHERS = [(4096, 4096), (4096, 11008), (8192, 8192)]


def int4(setup: Setup, outputs: int, inner: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Packed codes, scales and zero points of groups of 128."""
    groups = inner // 128
    return [
        (
            setup.bits(outputs, inner // 8),
            setup.rand(outputs, groups, dtype=FP16) * 0.01,
            setup.bits(outputs // 8, groups),
        )
        for _ in range(SETS)
    ]


def cublas(setup: Setup, x: Tensor, outputs: int) -> Peer:
    """The product with a dense fp16 weight."""
    dense = [setup.randn(outputs, x.shape[1], dtype=FP16) for _ in range(4)]
    return Peer(lambda i: linear(x, dense[i]), 4)


def cases(setup: Setup) -> Iterator[Case]:
    wide = setup.pick(WIDE, [(64, 256)])
    few = [(*sides, count, target) for sides in wide for count, target in ((1, 2.5), (16, 1.8))]
    few += [(*sides, 1, None) for sides in setup.pick(OTHERS, [])]
    for outputs, inner, count, target in few:
        weights, x = int4(setup, outputs, inner), setup.randn(count, inner, dtype=FP16)
        peers = {"cuBLAS fp16": cublas(setup, x, outputs)}
        for zeros in (True, False) if target else (True,):
            parts = [w if zeros else w[:2] for w in weights]
            yield Case(
                f"{'a' if zeros else ''}symmetric",
                lambda i, x=x, parts=parts: kernel.w4a16(x, *parts[i], group_size=128),
                partial(kernel.w4a16_ref, x.double(), *parts[0], group_size=128),
                shape=f"{count}x{outputs}x{inner}",
                sets=SETS,
                moved=nbytes(*parts[0]),
                peers=peers,
                targets={"cuBLAS fp16": target} if target else {},
            )
    (outputs, inner), count = wide[0], setup.pick(2048, 80)
    many, x = int4(setup, outputs, inner)[:4], setup.randn(count, inner, dtype=FP16)

    def plainly(i: int) -> Tensor:
        return linear(x, kernel.w4a16_dequantize(*many[i], in_features=inner, group_size=128))

    yield Case(
        "asymmetric, many tokens",
        lambda i: kernel.w4a16(x, *many[i], group_size=128),
        partial(kernel.w4a16_ref, x.double(), *many[0], group_size=128),
        shape=f"{count}x{outputs}x{inner}",
        limit=2e-3,
        sets=4,
        ops=2 * count * outputs * inner,
        peers={"dequantize + cuBLAS": Peer(plainly, 4), "cuBLAS fp16": cublas(setup, x, outputs)},
        targets={"dequantize + cuBLAS": 0.98},
    )
