"""Errors of a linear's output from the Gram matrix G = XᵀX of its inputs.

A weight that is off by Δ makes a squared output error of tr(Δ G Δᵀ), whatever the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2**15
"""Rows of Δ worked on at a time, which bounds the memory a vocabulary-sized linear takes."""


def gram_error(delta: Tensor, gram: Tensor, *, columns: int = 0) -> Tensor:
    """tr(Δ G Δᵀ) of an error Δ [O, C], as a scalar tensor.

    Computed as Σ_jk (ΔᵀΔ)_jk G_jk over the upper half only, `columns` columns at a time, so the
    Gram matrix is never rounded: Δ may come in bfloat16 on a GPU (its 2⁻⁹ is far below what
    separates two candidates), the products are summed and multiplied with G in float32.
    """
    width = delta.shape[1]
    # Fewer columns at a time compute less twice; of many, too few keep a CPU's products small.
    step = columns or (2048 if delta.is_cuda else max(96, width // 4))
    total = torch.zeros((), dtype=gram.dtype, device=delta.device)
    for start in range(0, width, step):
        stop = min(start + step, width)
        products = _product(delta[:, start:stop].t(), delta[:, start:])
        products.mul_(gram[start:stop, start:])
        total += products[:, : stop - start].sum() + 2 * products[:, stop - start :].sum()
    return total


def work_dtype(gram: Tensor) -> torch.dtype:
    """The dtype in which `gram_error` wants Δ: bfloat16 on a GPU, the Gram matrix's elsewhere."""
    return torch.bfloat16 if gram.is_cuda else gram.dtype


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ)/tr(W G Wᵀ) of a quantized weight [O, C], as a scalar tensor; 0 for 0/0."""
    error = torch.zeros((), dtype=torch.float32, device=gram.device)
    power = torch.zeros_like(error)
    for old, new in zip(torch.split(weight, ROWS), torch.split(quantized, ROWS), strict=True):
        error += gram_error((new.float() - old.float()).to(work_dtype(gram)), gram)
        power += gram_error(old.to(work_dtype(gram)), gram)
    return error / power.clamp(min=1e-30)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed in float32 where the factors are bfloat16."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
