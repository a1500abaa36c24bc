"""What a search of integer grids wants to know of a candidate, for each group of weights.

With weights w of a group, how much d each of them counts, and k the nearest codes less the zero
point under a scale s:
    error   Σ d·(k·s − w)²
    over    Σ d·k·w,   square   Σ d·k²;   their quotient is the best scale for these codes
Weights are read once and nothing of their size is written.
"""

import torch
from torch import Tensor

from compressor_kernels.search.group_dot import LARGEST, TILE


def grid_sums(
    groups: Tensor,
    counts: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    lowest: int = 0,
) -> Tensor:
    """Error, over and square of each group, float32 [3, G]. Where a scale is zero the error is
    infinite.

    groups  [G, g] float32, g at most `LARGEST`
    counts  [P, g] float32, of which group i has row i mod P
    scales  [G];  zeros  [G], or None for symmetric codes
    lowest  codes below it are not used
    Raises ValueError for shapes that do not fit.
    """
    import triton

    from compressor_kernels.search.grid_sums_jit import sums_kernel

    count, size = groups.shape
    fits = counts.dim() == 2 and counts.shape[1] == size and scales.shape == (count,)
    if not 0 < size <= LARGEST or not fits or (zeros is not None and zeros.shape != (count,)):
        raise ValueError(f"{list(counts.shape)} and {list(scales.shape)} for {list(groups.shape)}")
    out = torch.empty(3, count, dtype=torch.float32, device=groups.device)
    width = triton.next_power_of_2(size)
    rows = max(1, TILE // width)
    points = scales if zeros is None else zeros
    sums_kernel[(triton.cdiv(count, rows),)](
        groups.contiguous(),
        counts.contiguous(),
        scales.float().contiguous(),
        points.float().contiguous(),
        out,
        count,
        len(counts),
        size,
        ZEROS=zeros is not None,
        CENTRE=2 ** (bits - 1),
        LOWEST=lowest,
        LEVELS=2**bits - 1,
        ROWS=rows,
        WIDTH=width,
        num_warps=4,
    )
    return out


def grid_sums_ref(
    groups: Tensor,
    counts: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    lowest: int = 0,
) -> Tensor:
    """The plain reference of `grid_sums`."""
    counts = counts[torch.arange(len(groups), device=groups.device) % len(counts)]
    scale = scales.float()[:, None]
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float()[:, None]
    steps = (torch.round(groups / torch.where(scale == 0, 1.0, scale)) + zero).clamp(
        lowest, 2**bits - 1
    ) - zero
    error = (counts * (steps * scale - groups).square()).sum(1)
    over, square = (counts * steps * groups).sum(1), (counts * steps.square()).sum(1)
    return torch.stack([torch.where(scale[:, 0] == 0, torch.inf, error), over, square])
