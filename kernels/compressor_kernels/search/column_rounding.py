"""Some inputs of a weight rounded one after the other, each passing its error on to those after it:
what GPTQ (arXiv 2210.17323) and coordinate descent (arXiv 2309.01885) do again and again.

With W [n, O] what is left of n inputs' weights and M [n, n] how an input's error counts for later
ones, for j = 0 … n − 1:
    GPTQ      v = W_j,         q = nearest(v),  e = v − q
    descent   v = now_j − W_j, q = nearest(v),  e = q − now_j
    W_k ← W_k − M_jk·e   for all k > j
Grids are integers, symmetric or with zero points, and E2M1 under two levels of scales. Rows of the
weight do not depend on each other: a program has a few of them in registers all the way.
"""

from typing import Literal

import torch
from torch import Tensor

ROWS, WARPS = 4, 1
"""Rows of the weight that one program holds, so that all sums stay within a warp."""
LARGEST = 128
"""Inputs at a time."""
Kind = Literal["int", "e2m1"]


def round_columns(
    left: Tensor,
    matrix: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    kind: Kind,
    bits: int = 4,
    lowest: int = 0,
    now: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, O] and errors e float32 [n, O]; of several weights at a time all tensors have
    one more dimension before these.

    left    [n, O] float32, n at most `LARGEST`; not changed
    matrix  [n, n] float32, of which entries above the diagonal count
    groups  [n] int32, the row of `scales` for each input
    scales  [G, O] float32, all levels multiplied;  zeros  the same shape, or None
    lowest  codes below it are not used (integers)
    now     [n, O] float32 weights as they are, for descent; None for GPTQ
    Raises ValueError for shapes that do not fit.
    """
    import triton

    from compressor_kernels.search.column_rounding_jit import round_kernel

    count, rows = left.shape[-2:]
    weights = left.shape[:-2]
    fits = matrix.shape == (*weights, count, count) and groups.shape == (*weights, count)
    if not 0 < count <= LARGEST or len(weights) > 1 or not fits:
        raise ValueError(f"{list(matrix.shape)} and {list(groups.shape)} for {list(left.shape)}")
    wrong = scales.shape[:-2] != weights or scales.shape[-1] != rows
    if wrong or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(f"scales {list(scales.shape)} for {rows} rows")
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    errors = torch.empty(left.shape, dtype=torch.float32, device=left.device)
    round_kernel[(triton.cdiv(rows, ROWS), *(weights or (1,)))](
        left.contiguous(),
        matrix.contiguous(),
        groups.contiguous(),
        scales.contiguous(),
        scales if zeros is None else zeros.contiguous(),
        left if now is None else now.contiguous(),
        codes,
        errors,
        rows,
        count,
        scales.shape[-2],
        E2M1=kind == "e2m1",
        ZEROS=zeros is not None,
        DESCENT=now is not None,
        LEVELS=2**bits - 1,
        CENTRE=0 if zeros is not None else 2 ** (bits - 1),
        LOWEST=lowest,
        ROWS=ROWS,
        WIDTH=triton.next_power_of_2(count),
        num_warps=WARPS,
        num_stages=1,
    )
    return codes, errors


def round_columns_ref(
    left: Tensor,
    matrix: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    kind: Kind,
    bits: int = 4,
    lowest: int = 0,
    now: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain reference of `round_columns`."""
    left = left.clone()
    codes, errors = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    for j, group in enumerate(groups.tolist()):
        value = left[j] if now is None else now[j] - left[j]
        scale = scales[group]
        if kind == "int":
            zero = 2.0 ** (bits - 1) if zeros is None else zeros[group]
            code = (torch.round(value / scale) + zero).clamp(lowest, 2**bits - 1)
            rounded = (code - zero) * scale
        else:
            code, element = _e2m1_ref(torch.where(scale == 0, 0.0, value / scale))
            rounded = element * scale
        codes[j] = code.to(torch.uint8)
        errors[j] = value - rounded if now is None else rounded - now[j]
        left[j + 1 :] -= matrix[j, j + 1 :, None] * errors[j]
    return codes, errors


def _e2m1_ref(values: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes and what they stand for, ties to even."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    magnitude = (torch.round(magnitude / step) * step).clamp(max=6)
    index = torch.where(magnitude <= 2, magnitude * 2, magnitude / 2 + 4).floor()
    negative = values < 0
    return index + 8 * negative, torch.where(negative, -magnitude, magnitude)
