"""Errors of a linear's output from the Gram matrix G = XᵀX of its inputs.

A weight that is off by Δ makes a squared output error of tr(Δ G Δᵀ), whatever the number of tokens.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from compressor_kernels.search import gram_error as fused
from torch import Tensor

from compressor.numerics.processor import instructions, multiplies_bfloat16

ROWS = 2**15
"""Rows of Δ worked on at a time, which bounds the memory a vocabulary-sized linear takes."""


def gram_error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ) of an error Δ [O, C] in `work_dtype`, as a scalar tensor; or of a stack [E, O, C],
    [E], each of which has a Gram matrix of its own, or all the same one, or a few in turn.

    Computed as Σ_jk (ΔᵀΔ)_jk G_jk over the upper half only, so the Gram matrix is never rounded:
    in bfloat16 Δ is (its 2⁻⁹ is far below what separates two candidates), and on a CPU the products
    of different columns are, but not the sums of squares, of which one may outweigh all else. They
    are multiplied with G and summed in float32.
    """
    if delta.is_cuda:
        return fused.gram_error(delta, gram)
    if delta.dim() == 3:
        grams = gram[None] if gram.dim() == 2 else gram
        return torch.stack([gram_error(d, grams[i % len(grams)]) for i, d in enumerate(delta)])
    width, step = delta.shape[1], _step(delta)
    total = torch.zeros((), dtype=gram.dtype)
    squares = delta.square().sum(0, dtype=gram.dtype)
    made = torch.empty(step * width, dtype=delta.dtype), torch.empty(step * width, dtype=gram.dtype)
    for start in range(0, width, step):
        stop = min(start + step, width)
        shape = stop - start, width - start
        products, weighted = (x[: math.prod(shape)].view(shape) for x in made)
        torch.mm(delta[:, start:stop].t(), delta[:, start:], out=products)
        torch.mul(products, gram[start:stop, start:], out=weighted)
        torch.mul(squares[start:stop], gram.diagonal()[start:stop], out=weighted.diagonal())
        total += 2 * weighted.sum() - weighted[:, : stop - start].sum()
    return total


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """δ G δᵀ of every row δ of an error Δ [O, C] in `work_dtype`, float32 [O]: for comparisons,
    since products are rounded to the dtype of Δ, and G too."""
    total = torch.zeros(delta.shape[0], dtype=torch.float32, device=delta.device)
    width, step = delta.shape[1], _step(delta)
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = delta[:, start:stop]
        products = part @ gram[start:stop, start:stop].to(delta.dtype)
        if stop < width:
            products += (delta[:, stop:] @ gram[stop:, start:stop].to(delta.dtype)).mul_(2)
        total += products.mul_(part).sum(1, dtype=torch.float32)
    return total


def _step(delta: Tensor) -> int:
    """Columns that are multiplied at a time with those from them on, a quarter of all: fewer
    compute less twice, too few keep the products small, above all where units multiply them."""
    units = delta.is_cuda or (delta.dtype == torch.bfloat16 and instructions("amx_bf16"))
    return max(2048 if units else 96, delta.shape[1] // 4)


def work_dtype(gram: Tensor) -> torch.dtype:
    """The dtype in which `gram_error` wants Δ: bfloat16 on a GPU, and on a CPU that multiplies it
    faster than float32; else the Gram matrix's."""
    quick = gram.is_cuda or (gram.dtype == torch.float32 and multiplies_bfloat16())
    return torch.bfloat16 if quick else gram.dtype


def difference_error(quantized: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ) of Δ = quantized − weight [O, C], taken in float32, as `gram_error` has it."""
    # Written where it is wanted: a difference in float32 would be the largest tensor of a job.
    delta = torch.empty(weight.shape, dtype=work_dtype(gram), device=gram.device)
    torch.sub(quantized.float(), weight.float(), out=delta)
    return gram_error(delta, gram)


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ)/tr(W G Wᵀ) of a quantized weight [O, C], as a scalar tensor; 0 for 0/0."""
    return error_of_parts(_split(weight, quantized), gram)


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor | None) -> float:
    """Relative squared output error tr(ΔG Δᵀ)/tr(W G Wᵀ), or of the weights where G is None."""
    return float(error_of_parts(_split(weight, quantized), gram))


def error_of_parts(parts: Iterable[tuple[Tensor, Tensor]], gram: Tensor | None) -> Tensor:
    """`output_error` of a weight and what it became, some rows of both at a time, as a scalar
    tensor; of stacks [E, O, C] that of each, [E]."""
    errors, powers = [], []
    for old, new in parts:
        if gram is None:
            errors.append((new - old).float().square().sum((-2, -1)))
            powers.append(old.float().square().sum((-2, -1)))
        else:
            errors.append(difference_error(new, old, gram))
            powers.append(gram_error(old.to(work_dtype(gram)), gram))
    return share_of(errors, powers)


def share_of(errors: Sequence[Tensor], powers: Sequence[Tensor]) -> Tensor:
    """Σ errors / Σ powers of parts of a weight, or of each of several; 0 for 0/0."""
    return torch.stack(list(errors)).sum(0) / torch.stack(list(powers)).sum(0).clamp(min=1e-30)


def _split(weight: Tensor, quantized: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(weight, ROWS), torch.split(quantized, ROWS), strict=True)


def even_diagonal(gram: Tensor, divisor: Tensor | None) -> Tensor:
    """The diagonal [C] float64 of inputs that are all as large as those seen are on average, before
    they were divided by `divisor` [C]; zero where none was seen."""
    diagonal = gram.diagonal().double()
    seen = diagonal > 0
    square = torch.ones_like(diagonal) if divisor is None else divisor.to(diagonal).square()
    mean = (diagonal * square)[seen].mean() if bool(seen.any()) else diagonal.sum()
    return mean / square
