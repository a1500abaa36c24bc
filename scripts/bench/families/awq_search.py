"""What AWQ computes again and again while it searches: errors of candidates, and their weight.

The Gram matrix's error tr(ΔGΔᵀ) is timed at the shapes of a block of Llama-2-7B; TOP/s are of the
upper half of the square, which is what is needed.
"""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup
from compressor_kernels.search.awq_candidate import (
    candidate_delta,
    candidate_delta_ref,
    clip_bounds,
    clip_bounds_ref,
)
from compressor_kernels.search.gram_error import gram_error, gram_error_ref
from torch import Tensor

HIDDEN, WIDE = 4096, 11008
GRID = {"bits": 4, "symmetric": False, "stored": torch.bfloat16}


def torch_gram_error(delta: Tensor, gram: Tensor, columns: int = 2048) -> Tensor:
    """The same from products that are written out, `columns` rows of the square at a time."""
    total = torch.zeros((), device=delta.device)
    for start in range(0, delta.shape[1], columns):
        stop = min(start + columns, delta.shape[1])
        products = torch.mm(delta[:, start:stop].t(), delta[:, start:], out_dtype=torch.float32)
        products.mul_(gram[start:stop, start:])
        total += products[:, : stop - start].sum() + 2 * products[:, stop - start :].sum()
    return total


def off(relative: float, absolute: float = 0.0):
    """Share of elements that differ by more."""
    return lambda out, want: (
        ((out.float() - want.float()).abs() > relative * want.float().abs() + absolute)
        .float().mean().item()
    )  # fmt: skip


def cases(setup: Setup) -> Iterator[Case]:
    shapes = [(3 * HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)]
    for rows, columns in setup.pick(shapes, [(96, 256)]):
        # All values are positive, so that each element of the square counts alike.
        delta, x = setup.rand(rows, columns, dtype=torch.bfloat16), setup.rand(columns, columns)
        gram = x.t() @ x
        yield Case(
            "tr(ΔGΔᵀ)",
            lambda i, d=delta, g=gram: gram_error(d, g),
            partial(gram_error_ref, delta, gram),
            shape=f"{rows}x{columns}",
            limit=5e-4,  # tensor cores cut off what they add in float32
            ops=rows * columns * (columns + 1),
            peers={"PyTorch": Peer(partial(lambda d, g, i: torch_gram_error(d, g), delta, gram))},
        )
    rows, columns = setup.pick((WIDE, HIDDEN), (32, 256))
    weights = [setup.randn(rows, columns, dtype=torch.float32) * 0.02 for _ in range(2)]
    scales = torch.exp(setup.randn(columns, dtype=torch.float32))
    outs = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    yield Case(
        "a candidate's Δ",
        lambda i: candidate_delta(weights[i], scales, group_size=128, out=outs[i], **GRID),
        partial(candidate_delta_ref, weights[0], scales, group_size=128, **GRID),
        shape=f"{rows}x{columns}",
        error=off(1e-2, 1e-6),
        sets=2,
        moved=weights[0].numel() * 6,
    )
    x = setup.randn(columns // 128, 512, 128, dtype=torch.float32)
    gram = x.mT @ x
    yield Case(
        "bounds of clipping",
        lambda i: clip_bounds(weights[i], gram, **GRID)[0],
        lambda: clip_bounds_ref(weights[0], gram, **GRID)[0],
        shape=f"{rows}x{columns}",
        limit=0.05,  # where two bounds are as good
        error=off(1e-3),
        sets=2,
        ops=2 * weights[0].numel() * 128 * 10,
    )
