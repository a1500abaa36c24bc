"""Codes improved one input at a time (QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542).

The error tr((Ŵ − T) H (Ŵ − T)ᵀ) is quadratic in the column of one input, whose minimum is
    v_j = ŵ_j − [(Ŵ − T)H]_j / H_jj,
and a column's nearest codes to v_j are the best that it can have while all others stay. Each step
lowers every row's error or leaves it.
"""

import torch
from torch import Tensor

from compressor.numerics.columns import Columns

BLOCK = 128
"""Inputs after which what changed is passed on to all later inputs in one product."""


def descend(
    codes: Tensor, values: Tensor, target: Tensor, hessian: Tensor, columns: Columns, *, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Better codes uint8 [O, C], and what they stand for, float32 [O, C].

    codes, values  where to begin: codes and what they stand for, [O, C]
    target   [O, C] float32
    hessian  [C, C] float32, with a positive diagonal
    columns  the grids of the rows, which stay as they are
    sweeps   times that all inputs are gone through
    """
    count = target.shape[1]
    # Transposed, so that one input's weights lie together.
    made, left, goal = (x.t().contiguous() for x in (codes, values, target))
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        gradient = hessian @ (left - goal)  # anew for each sweep: the sums drift
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            local = gradient[start:stop].div_(diagonal[start:stop, None])
            pull = hessian[start:stop, start:stop] / diagonal[start:stop, None]
            moved = torch.empty_like(local)
            if columns.fused:
                places = torch.arange(start, stop, device=local.device)
                now = left[start:stop]
                made[start:stop], moved = columns.round_together(local, -pull.t(), places, now=now)
                now += moved
            for j in range(0 if columns.fused else stop - start):
                place = start + j
                code, rounded = columns.round(left[place] - local[j], place)
                torch.sub(rounded, left[place], out=moved[j])
                made[place], left[place] = code, rounded
                local[j + 1 :].addr_(pull[j + 1 :, j], moved[j])
            if stop < count:
                gradient[stop:].addmm_(hessian[stop:, start:stop], moved)
    return made.t(), left.t()
