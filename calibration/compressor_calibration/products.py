"""Sums of products of vectors, in bands: of several ranks each may add some."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

# Rows cast to fp32 at a time where a product cannot take the input's own dtype.
CAST_ROWS = 4096
# Rows of a Gram matrix that are added to at a time, from the diagonal on: fewer compute less twice,
# too few make small products.
BAND, GPU_BAND = 192, 1024
# Rows of the cross product with the original's inputs that are computed at a time.
CROSS_BAND = 1024


def bands(channels: int, device: torch.device) -> list[float]:
    """How much work each band of a Gram matrix is."""
    edges = _edges(channels, device.type)
    return [float((min(last, channels) - first) * (channels - first)) for first, last in edges]


def cross_bands(channels: int) -> int:
    """How many bands of equal work a cross product has."""
    return -(-channels // CROSS_BAND)


def add_gram(gram: Tensor, x: Tensor, mine: Collection[int] | None) -> None:
    """gram += xᵀ x in place, accumulated in fp32; below the diagonal only in part.

    mine  numbers of the bands that are added to, if not all
    """
    if (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(_added(part, left.T, right) for part, left, right in _bands(gram, x, mine))
    ):
        return
    for start in range(0, x.shape[0], CAST_ROWS):
        for part, left, right in _bands(gram, x[start : start + CAST_ROWS].float(), mine):
            part.addmm_(left.T, right)


def add_cross(total: Tensor, theirs: Tensor, ours: Tensor, mine: Collection[int] | None) -> None:
    """total += (theirs − ours)ᵀ ours in place, in fp32.

    theirs  an infinity is the largest number
    mine  numbers of the bands of rows that are added to, if not all
    """
    for start in range(0, ours.shape[0], CAST_ROWS):
        rows = slice(start, start + CAST_ROWS)
        right = ours[rows].float()
        left = theirs[rows].float().nan_to_num_() - right
        quick = ours.is_cuda and ours.dtype == torch.bfloat16
        halves = _in_two(left) if quick else [left]
        for number, first in enumerate(range(0, total.shape[0], CROSS_BAND)):
            if mine is None or number in mine:
                band = slice(first, first + CROSS_BAND)
                for half in halves:
                    _add_product(total[band], half[:, band].T, ours[rows] if quick else right)


def _in_two(x: Tensor) -> list[Tensor]:
    """Two bfloat16 tensors whose sum has 16 bits of x: multiplied in tensor cores both take a sixth
    of what one float32 product does."""
    high = x.clamp(*(torch.finfo(torch.bfloat16).max * sign for sign in (-1, 1))).bfloat16()
    return [high, (x - high.float()).bfloat16()]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right in place, accumulated in fp32."""
    if left.dtype == torch.float32 or not _added(total, left, right):
        total.addmm_(left.float(), right.float())


def _added(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """total += left right in place, of half precision, accumulated in fp32; not where this build
    has no such product."""
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def _bands(
    gram: Tensor, x: Tensor, mine: Collection[int] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of a Gram matrix from the diagonal on, and the columns of x whose products they hold."""
    for number, (first, last) in enumerate(_edges(gram.shape[0], gram.device.type)):
        if mine is None or number in mine:
            yield gram[first:last, first:], x[:, first:last], x[:, first:]


def _edges(channels: int, device: str) -> Iterator[tuple[int, int]]:
    """First and last row of each band."""
    band = GPU_BAND if device == "cuda" else BAND
    for first in range(0, channels, band):
        yield first, first + band


def mirror(gram: Tensor) -> None:
    """Fill in what `add_gram` leaves out."""
    for first, last in _edges(gram.shape[0], gram.device.type):
        gram[last:, first:last] = gram[first:last, last:].T
