"""Σ over each group of a·b, of two matrices of groups: a weight's gradient becomes that of the
scales of its groups, once each is weighed with what the scale is multiplied by."""

import torch
from torch import Tensor

LARGEST = 2**14
"""Numbers of a group at most."""
TILE = 4096
"""Numbers that one program reads at a time."""


def group_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums float32 [G] of products of groups.

    a, b  [G, g], of any float dtype; g at most `LARGEST`
    Raises ValueError for shapes that do not fit.
    """
    import triton

    from compressor_kernels.search.group_dot_jit import dot_kernel

    if a.dim() != 2 or a.shape != b.shape or not 0 < a.shape[1] <= LARGEST:
        raise ValueError(f"{list(a.shape)} and {list(b.shape)}")
    count, size = a.shape
    out = torch.empty(count, dtype=torch.float32, device=a.device)
    width = triton.next_power_of_2(size)
    rows = max(1, TILE // width)
    dot_kernel[(triton.cdiv(count, rows),)](
        a.contiguous(), b.contiguous(), out, count, size, ROWS=rows, WIDTH=width, num_warps=4
    )
    return out


def group_dot_ref(a: Tensor, b: Tensor) -> Tensor:
    """The plain reference of `group_dot`, for groups of any size."""
    return (a.float() * b.float()).sum(1)
