"""The best scales of integer codes that stay as they are.

With codes and zero points fixed, a row is ŵ = Σ_i s_i·k_i, where k_i holds the codes less the zero
point in group i and zeros elsewhere. Moving the scales by δ changes its error (ŵ − t)ᵀH(ŵ − t) by
    δᵀA·δ − 2·δᵀb,   A_ij = k_iᵀ H k_j,   b_i = k_iᵀ H (t − ŵ),
which is least where A·δ = b.
"""

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor, decode_elements

RIDGE = 1e-6
"""Share of A's mean diagonal added to it: a group whose codes are all zero points has no scale."""
RANGE = (0.2, 5.0)
"""How far a scale may move, as a factor; one that would go further stays."""


def refit_scales(q: QTensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Scales [O, groups] in the spec's dtype for integer codes towards a target [O, C] float32.

    q        with a scale per group or output channel
    hessian  [C, C] float32
    A row whose error would not become smaller, scales rounded as they are stored, keeps its own.
    """
    groups = q.scales.shape[1]
    steps = decode_elements(q.codes, q.spec, torch.float32).view(q.shape[0], groups, -1)
    if q.zeros is not None:
        steps.sub_(q.zeros.float().unsqueeze(-1))
    size = steps.shape[2]
    missing = target - (steps * q.scales.float().unsqueeze(-1)).view(target.shape)
    matrix = torch.empty(*q.scales.shape, groups, dtype=torch.float64, device=target.device)
    pull = torch.empty(q.scales.shape, dtype=torch.float64, device=target.device)
    for i in range(groups):
        reach = steps[:, i] @ hessian[i * size : (i + 1) * size]
        matrix[:, i] = (reach.view(steps.shape) * steps).sum(-1)
        pull[:, i] = (reach * missing).sum(-1)
    ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(-1) + 1e-30
    lower, failed = torch.linalg.cholesky_ex(
        matrix + torch.diag_embed(ridge[:, None].expand_as(pull))
    )
    move = torch.cholesky_solve(pull.unsqueeze(-1), lower).squeeze(-1)
    old = q.scales.double()
    new = (old + move).to(q.scales.dtype)
    factor = new.double() / old
    near = (factor >= RANGE[0]) & (factor <= RANGE[1]) & (failed == 0)[:, None]
    new = torch.where(near, new, q.scales)
    move = new.double() - old
    change = ((matrix @ move.unsqueeze(-1)).squeeze(-1) - 2 * pull).mul_(move).sum(1)
    return torch.where((change < 0)[:, None], new, q.scales)
