"""What the inputs of linears come to in each channel, over the rows of one place or of several.

A row with a NaN or an infinity counts nowhere, and its copy is zeros. Whether a row is finite is
asked in one pass, sums and the copy are made in a second; PyTorch's own operations take eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROWS = 256
"""Rows whose sums one program makes; partial sums are added in their order."""
STEP, COLUMNS = 16, 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """Of S places with rows of C channels.

    good        bool [rows, 1]: whether all values of a row are finite
    counts      int64 [S, 2]: rows that are, and that are not
    magnitudes  float32 [S, C]: sum of |x|;  largest  float32 [S, C]: maximum of |x|
    rows        like x, without rows that are not finite, or None if not asked for
    """

    good: Tensor
    counts: Tensor
    magnitudes: Tensor
    largest: Tensor
    rows: Tensor | None


def channel_sums(x: Tensor, sizes: Sequence[int], *, copy: bool) -> ChannelSums:
    """Sums over x [rows, C], in fp16, bf16 or fp32, of places with so many rows each, one after the
    other.

    copy  whether rows without what is not finite are wanted
    The same inputs give the same bits on the same device, however many places there are. Raises
    ValueError where sizes do not add up to the rows.
    """
    import triton

    from compressor_kernels.inputs.channel_sums_jit import finite_kernel, sums_kernel

    _check(x, sizes)
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, channels), device = x.shape, x.device
    work, most = _work(tuple(sizes), device)
    good = torch.empty(rows, 1, dtype=torch.bool, device=device)
    copied = torch.empty(rows, channels, dtype=x.dtype, device=device) if copy else None
    # Places with fewer rows than the largest have fewer partial sums.
    counts = torch.zeros(len(sizes), most, 2, dtype=torch.int64, device=device)
    sums = torch.zeros(2, len(sizes), most, channels, dtype=torch.float32, device=device)
    if rows and channels:
        finite_kernel[(triton.cdiv(rows, 4),)](
            x, good, rows, channels, x.stride(0), ROWS=4, COLUMNS=1024, num_warps=4
        )
        sums_kernel[(len(work), triton.cdiv(channels, COLUMNS))](
            x,
            good,
            work,
            copied,
            counts,
            sums,
            channels,
            x.stride(0),
            sums.stride(0),
            ROWS=ROWS,
            STEP=STEP,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return ChannelSums(good, counts.sum(1), sums[0].sum(1), sums[1].amax(1), copied)


def channel_sums_ref(x: Tensor, sizes: Sequence[int], *, copy: bool) -> ChannelSums:
    """`channel_sums` in plain PyTorch, sums in float64."""
    _check(x, sizes)
    good = x.isfinite().all(1, keepdim=True)
    rows = torch.where(good, x, torch.zeros((), dtype=x.dtype, device=x.device))
    flags = torch.split(torch.cat([good, ~good], dim=1), list(sizes))
    places = torch.split(rows.abs().double(), list(sizes))
    nothing = x.new_zeros(1, x.shape[1], dtype=torch.float64)
    return ChannelSums(
        good,
        torch.stack([part.sum(0) for part in flags]),
        torch.stack([part.sum(0) for part in places]).float(),
        torch.stack([torch.cat([nothing, part]).amax(0) for part in places]).float(),
        rows if copy else None,
    )


@lru_cache(maxsize=64)
def _work(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Rows of each program, and where its sums go: int32 [programs, 3], the first row, the one
    after the last, and the number of the sums; and how many sums a place has at most."""
    most = max(1, -(-max(sizes) // ROWS))
    programs, before = [], 0
    for place, size in enumerate(sizes):
        for number, first in enumerate(range(0, size, ROWS)):
            last = before + min(first + ROWS, size)
            programs.append((before + first, last, place * most + number))
        before += size
    return torch.tensor(programs, dtype=torch.int32, device=device), most


def _check(x: Tensor, sizes: Sequence[int]) -> None:
    if x.dim() != 2 or not sizes or min(sizes) < 0 or sum(sizes) != len(x):
        raise ValueError(f"places of {list(sizes)} rows do not make up {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"inputs in {x.dtype}, not fp16, bf16 or fp32")
