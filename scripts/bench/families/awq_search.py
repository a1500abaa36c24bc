"""What AWQ computes again and again while it searches: errors of candidates, and their weight.

The Gram matrix's error tr(ΔGΔᵀ) is timed at the shapes of a block of Llama-2-7B; TOP/s are of the
upper half of the square, which is what is needed.
"""

from collections.abc import Callable, Iterator

import torch
from case import Call, Case, Setup
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


def off(relative: float, absolute: float = 0.0) -> Callable[[Tensor, Tensor], float]:
    """Share of elements that differ by more."""
    return lambda out, want: (
        1 - torch.isclose(out.float(), want.float(), rtol=relative, atol=absolute).float().mean()
    ).item()  # fmt: skip


def cases(setup: Setup) -> Iterator[Case]:
    shapes = [(3 * HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)]
    for rows, columns in setup.pick(shapes, [(96, 256)]):
        # All values are positive, so that each element of the square counts alike.
        delta, x = setup.rand(rows, columns, dtype=torch.bfloat16), setup.rand(columns, columns)
        both = [(delta, x.t() @ x)]
        yield Case(
            gram_error,
            both,
            name="tr(ΔGΔᵀ)",
            reference=gram_error_ref,
            shape=f"{rows}x{columns}",
            limit=5e-4,  # tensor cores cut off what they add in float32
            ops=rows * columns * (columns + 1),
            peers={"PyTorch": Call(torch_gram_error, both)},
        )
    rows, columns = setup.pick((WIDE, HIDDEN), (32, 256))
    weights = [setup.randn(rows, columns, dtype=torch.float32) * 0.02 for _ in range(2)]
    scales = torch.exp(setup.randn(columns, dtype=torch.float32))
    yield Case(
        candidate_delta,
        [(weight, scales) for weight in weights],
        {"group_size": 128, **GRID},
        name="a candidate's Δ",
        reference=candidate_delta_ref,
        shape=f"{rows}x{columns}",
        error=off(1e-2, 1e-6),
    )
    x = setup.randn(columns // 128, 512, 128, dtype=torch.float32)
    gram = x.mT @ x
    yield Case(
        clip_bounds,
        [(weight, gram) for weight in weights],
        GRID,
        name="bounds of clipping",
        reference=clip_bounds_ref,
        shape=f"{rows}x{columns}",
        limit=0.05,  # where two bounds are as good
        error=lambda out, want: off(1e-3)(out[0], want[0]),
        ops=2 * weights[0].numel() * 128 * 10,
    )
