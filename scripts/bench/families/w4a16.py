"""Few tokens times int4 weights, and many."""

from collections.abc import Iterator

import torch
from case import Call, Case, Setup
from compressor_kernels.linear import w4a16 as kernel
from torch import Tensor
from torch.nn.functional import linear

FP16, SETS = torch.float16, 8
GROUPS = {"group_size": 128}
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


def cublas(setup: Setup, x: Tensor, outputs: int) -> Call:
    """The product with a dense fp16 weight."""
    return Call(linear, [(x, setup.randn(outputs, x.shape[1], dtype=FP16)) for _ in range(4)])


def dequantized(x: Tensor, *parts: Tensor) -> Tensor:
    return linear(x, kernel.w4a16_dequantize(*parts, in_features=x.shape[1], **GROUPS))


def cases(setup: Setup) -> Iterator[Case]:
    wide = setup.pick(WIDE, [(64, 256)])
    few = [(*sides, count, target) for sides in wide for count, target in ((1, 2.5), (16, 1.8))]
    few += [(*sides, 1, None) for sides in setup.pick(OTHERS, [])]
    for outputs, inner, count, target in few:
        weights, x = int4(setup, outputs, inner), setup.randn(count, inner, dtype=FP16)
        peers = {"cuBLAS fp16": cublas(setup, x, outputs)}
        for zeros in (True, False) if target else (True,):
            yield Case(
                kernel.w4a16,
                [(x, *(parts if zeros else parts[:2])) for parts in weights],
                GROUPS,
                name=f"{'a' if zeros else ''}symmetric",
                reference=kernel.w4a16_ref,
                shape=f"{count}x{outputs}x{inner}",
                peers=peers,
                targets={"cuBLAS fp16": target} if target else {},
            )
    (outputs, inner), count = wide[0], setup.pick(2048, 80)
    x = setup.randn(count, inner, dtype=FP16)
    sets = [(x, *parts) for parts in int4(setup, outputs, inner)[:4]]
    yield Case(
        kernel.w4a16,
        sets,
        GROUPS,
        name="asymmetric, many tokens",
        reference=kernel.w4a16_ref,
        shape=f"{count}x{outputs}x{inner}",
        limit=2e-3,
        ops=2 * count * outputs * inner,
        peers={
            "dequantize + cuBLAS": Call(dequantized, sets),
            "cuBLAS fp16": cublas(setup, x, outputs),
        },
        targets={"dequantize + cuBLAS": 0.98},
    )
