"""Errors of a linear's output from the Gram matrix G = XᵀX of its inputs.

A weight that is off by Δ makes a squared output error of tr(Δ G Δᵀ), whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from compressor_kernels.search import gram_error as fused
from torch import Tensor

from compressor.numerics.processor import instructions

ROWS = 2**15
"""Rows of Δ worked on at a time, which bounds the memory a vocabulary-sized linear takes."""


def gram_error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ) of an error Δ [O, C] in `work_dtype`, as a scalar tensor; or of a stack [E, O, C],
    of which each has a Gram matrix or all have the same one, [E].

    Computed as Σ_jk (ΔᵀΔ)_jk G_jk over the upper half only, so the Gram matrix is never rounded:
    where units multiply matrices of bfloat16, on a GPU and on some CPUs, only Δ is (its 2⁻⁹ is far
    below what separates two candidates), the products are summed and multiplied with G in float32.
    """
    if delta.is_cuda:
        return fused.gram_error(delta, gram)
    if delta.dim() == 3:
        grams = gram.expand(len(delta), *gram.shape[-2:])
        return torch.stack([gram_error(d, g) for d, g in zip(delta, grams, strict=True)])
    width = delta.shape[1]
    total = torch.zeros((), dtype=gram.dtype)
    for start, stop in _bands(width, 2048 if _has_matrix_units() else 96):
        products = _product(delta[:, start:stop].t(), delta[:, start:])
        products.mul_(gram[start:stop, start:])
        total += products[:, : stop - start].sum() + 2 * products[:, stop - start :].sum()
    return total


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """δ G δᵀ of every row δ of an error Δ [O, C] in `work_dtype`, float32 [O]: for comparisons,
    since products are rounded to the dtype of Δ, and G too."""
    total = torch.zeros(delta.shape[0], dtype=torch.float32, device=delta.device)
    for start, stop in _bands(delta.shape[1], 2048 if delta.is_cuda else 96):
        part = delta[:, start:stop]
        products = _product(delta[:, stop:], gram[stop:, start:stop].to(delta.dtype)).mul_(2)
        products += _product(part, gram[start:stop, start:stop].to(delta.dtype))
        total += products.mul_(part).sum(1, dtype=torch.float32)
    return total


def _bands(width: int, least: int) -> Iterator[tuple[int, int]]:
    """Quarters of the columns, of which each is multiplied with those from it on: fewer at a time
    compute less twice, too few keep the products small."""
    step = max(least, width // 4)
    return ((start, min(start + step, width)) for start in range(0, width, step))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 rounded to bfloat16 on its way into the units that a CPU has for it."""
    if not _has_matrix_units():
        return a @ b
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return a @ b
    finally:
        matmul.fp32_precision = before


def _has_matrix_units() -> bool:
    """Whether this processor has Intel's AMX for bfloat16, and a PyTorch that tells."""
    return instructions("amx_bf16")


def work_dtype(gram: Tensor) -> torch.dtype:
    """The dtype in which `gram_error` wants Δ: bfloat16 on a GPU, the Gram matrix's elsewhere."""
    return torch.bfloat16 if gram.is_cuda else gram.dtype


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
    return torch.stack(errors).sum(0) / torch.stack(powers).sum(0).clamp(min=1e-30)


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
