"""GPTQ of weights of one shape that each read an input of their own, such as experts' outputs.

There are hundreds of them, and one after the other they would take as long as it takes to begin as
many small operations. Here all of a stack are worked on in each operation, as `gptq` works on one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from compressor_kernels.search.column_rounding import round_columns
from torch import Tensor

from compressor.ir.qtensor import QTensor
from compressor.numerics.columns import Columns
from compressor.numerics.gptq import BLOCK, RETRIES, Rounded
from compressor.numerics.gram import even_diagonal, gram_error, work_dtype


@dataclass(frozen=True, slots=True)
class InverseFactors:
    """What `InverseFactor` is for each weight of a stack.

    gram     [E, C, C] float32, undamped
    factor   [E, C, C] float32 upper triangular, of the damped matrices in their orders
    order    [E, C] which input is rounded as the i-th
    damping  share of the mean of the diagonal that was added
    usable   which matrices are finite, not zero, and could be factored
    """

    gram: Tensor
    factor: Tensor
    order: Tensor
    damping: Sequence[float]
    usable: Sequence[bool]


def inverse_factors(
    gram: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    divisors: Sequence[Tensor | None],
) -> InverseFactors:
    """`inverse_factor` of Gram matrices [E, C, C]; of one that is not usable anything."""
    count, size = gram.shape[:2]
    finite = torch.isfinite(gram).flatten(1).all(dim=1)
    gram = torch.where(finite[:, None, None], gram, torch.eye(size, device=gram.device)).float()
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    seen = diagonal > 0
    good = (finite & seen.any(dim=1)).tolist()
    order = torch.arange(size, device=gram.device).expand(count, size)
    if act_order:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    backwards = order.flip(1)
    rows = torch.take_along_dim(gram.double(), backwards[:, :, None], 1)
    matrix = torch.take_along_dim(rows, backwards[:, None, :], 2)
    del rows
    even = torch.stack([even_diagonal(g, d) for g, d in zip(gram, divisors, strict=True)])
    means = [
        d[s].mean() if use else d.sum() for d, s, use in zip(diagonal, seen, good, strict=True)
    ]
    unseen = (~seen).double() * torch.stack(means)[:, None]
    damped = [max(damping, 1e-8)] * count
    lower = torch.empty_like(matrix)
    left = [i for i in range(count) if good[i]]
    for _ in range(RETRIES):
        if not left:
            break
        some = torch.tensor(left, device=gram.device)
        share = torch.tensor([damped[i] for i in left], dtype=torch.float64, device=gram.device)
        added = unseen[some] + share[:, None] * even[some]
        added = torch.take_along_dim(added, backwards[some], 1)
        lower[some], failed = torch.linalg.cholesky_ex(matrix[some] + torch.diag_embed(added))
        left = [i for i, lacks in zip(left, failed.tolist(), strict=True) if lacks]
        for i in left:
            damped[i] *= 2
    for i in range(count):
        if i in left or not good[i]:
            good[i] = False
            lower[i] = torch.eye(size, dtype=torch.float64, device=gram.device)
    del matrix
    eye = torch.eye(size, dtype=torch.float64, device=gram.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    factor = inverse.flip(1, 2).float().contiguous()
    whole = torch.isfinite(factor).flatten(1).all(dim=1).tolist()
    return InverseFactors(
        gram=gram,
        factor=factor,
        order=order,
        damping=damped,
        usable=[a and b for a, b in zip(good, whole, strict=True)],
    )


def gptq_stack(
    weights: Tensor, nearest: QTensor, inverses: InverseFactors, *, lowest: int = 0
) -> list[Rounded]:
    """Round weights [E, O, C], each on the grids of its nearest codes.

    nearest  of all weights one above the other, of a spec whose `rows_apart`
    lowest   codes below it are not used
    """
    count = len(weights)
    weights = weights.float()
    codes = _solve(weights, nearest, inverses, lowest=lowest)
    ours = replace(nearest, codes=codes)
    errors = [
        _row_errors(q.dequantize().view_as(weights).sub_(weights), inverses.gram)
        for q in (ours, nearest)
    ]
    better = errors[0] < errors[1]
    least = torch.where(better, errors[0], errors[1])
    # As `gptq` has it.
    power = gram_error(weights.to(work_dtype(inverses.gram)), inverses.gram).double()
    chosen = torch.where(better.view(-1, 1), codes, nearest.codes)
    sums = [x.double().sum(dim=1) for x in (~better, least, errors[1])]
    return [
        Rounded(
            q=q,
            kept=int(kept),
            error=error / max(total, 1e-30),
            nearest=plain / max(total, 1e-30),
        )
        for q, (kept, error, plain, total) in zip(
            replace(nearest, codes=chosen).parts(count),
            torch.stack([*sums, power], dim=1).tolist(),
            strict=True,
        )
    ]


def _row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """δ H δᵀ of each row of each Δ [E, O, C], [E, O]."""
    return torch.bmm(delta, gram).mul_(delta).sum(2)


def _solve(weights: Tensor, nearest: QTensor, inverses: InverseFactors, *, lowest: int) -> Tensor:
    """Codes uint8 [E * O, C], in the model's order."""
    count, height, width = weights.shape
    columns = Columns([nearest], lowest=lowest)
    # [E, groups, O] of what is [groups, E * O].
    scales = columns.scales.view(-1, count, height).transpose(0, 1).contiguous()
    zeros = columns.zeros
    if zeros is not None:
        zeros = zeros.view(-1, count, height).transpose(0, 1).contiguous()
    order, factor = inverses.order, inverses.factor
    groups = order // columns.size
    # Transposed, so that one input's weights lie together.
    left = torch.take_along_dim(weights.mT, order[:, :, None], 1).contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weights.device)
    every = torch.arange(count, device=weights.device)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        local = factor[:, start:stop, start:stop]
        scale = local.diagonal(dim1=1, dim2=2)[:, :, None]
        # A division by R_jj, taken out of the loop.
        local = local / scale
        if columns.fused:
            codes[:, start:stop], errors = round_columns(
                left[:, start:stop],
                local,
                groups[:, start:stop].int(),
                scales,
                zeros,
                kind="int" if nearest.spec.element == "int" else "e2m1",
                bits=nearest.spec.bits,
                lowest=lowest,
            )
        else:
            errors = torch.empty_like(left[:, start:stop])
            for j in range(stop - start):
                value, group = left[:, start + j], groups[:, start + j]
                grid = None if zeros is None else zeros[every, group]
                code, rounded = columns.nearest(value, scales[every, group], grid)
                codes[:, start + j] = code
                error = torch.sub(value, rounded, out=errors[:, j])
                rest = left[:, start + j + 1 : stop]
                rest.sub_(local[:, j, j + 1 :, None] * error[:, None])
        if stop < width:
            scaled = errors / scale
            left[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, scaled, alpha=-1)
    out = torch.empty_like(codes)
    out.scatter_(1, order[:, :, None].expand_as(codes), codes)
    return out.mT.reshape(count * height, width)
