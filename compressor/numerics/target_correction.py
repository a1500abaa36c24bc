"""What a linear should be, once its inputs are no longer the original model's.

The blocks before it were quantized, so that it sees X in place of X°. Least squares asks for W*
with ‖X·W*ᵀ − X°·Wᵀ‖² least (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692):
    W* = W + W·(X° − X)ᵀX·(XᵀX + λI)⁻¹.
All of it follows the noise of the calibration text; a share of it generalizes better.
"""

import torch
from torch import Tensor

from compressor.numerics.gram import even_diagonal

RIDGE = 0.05
"""λ as a share of the Gram matrix's mean diagonal."""


def correction(
    gram: Tensor,
    cross: Tensor,
    *,
    strength: float,
    divisor: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor | None:
    """α·(X° − X)ᵀX·(XᵀX + λI)⁻¹, float32 [C, C]; None where that is not finite or X is zero.

    gram      XᵀX, [C, C]
    cross     (X° − X)ᵀX, [C, C], of the same tokens
    strength  α
    divisor   [C] what the inputs have been divided by for the rounding's sake: λ is that of the
              inputs before
    weight    [O, C]: then W times all of that, [O, C], which with few rows is less work
    """
    mean = gram.diagonal().double().mean()
    if not bool(torch.isfinite(cross).all()) or not bool(torch.isfinite(gram).all()) or mean <= 0:
        return None
    shifted = gram.double()
    shifted.diagonal().add_(RIDGE * even_diagonal(gram, divisor))
    lower, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed):
        return None
    right = cross if weight is None else weight.to(cross.dtype) @ cross
    # The matrix is symmetric: B·M⁻¹ = (M⁻¹·Bᵀ)ᵀ.
    return torch.cholesky_solve(right.double().T, lower).T.mul(strength).float()
