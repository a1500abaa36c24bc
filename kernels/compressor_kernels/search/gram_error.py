"""tr(Δ G Δᵀ) of a weight that is off by Δ, with the Gram matrix G = XᵀX of its inputs.

It is Σ_jk (ΔᵀΔ)_jk G_jk, and both factors are symmetric: tiles of the square on and above the
diagonal are multiplied in tensor cores, weighed with G where their sums lie, and leave one number
each. Nothing of the size of the square is written. Of a stack of weights all squares are one
launch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compressor_kernels.triton.launch import dense, processors

BAND = 2048
"""Columns of the square whose tiles run one row after the other, so that they share Δ in L2."""


@dataclass(frozen=True, slots=True)
class GramTiles:
    """Rows and columns of a tile of the square and rows of Δ in a step, powers of two up to `BAND`;
    warps, depth of the pipeline, and how many programs a multiprocessor holds."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 4
    resident: int = 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the pipeline takes."""
        return 2 * self.num_stages * self.block_k * (self.block_m + self.block_n)


SMALL_TILES = GramTiles(128, 128, 32, num_stages=3)
"""For devices with little shared memory."""


def gram_error(delta: Tensor, gram: Tensor, *, tiles: GramTiles | None = None) -> Tensor:
    """tr(Δ G Δᵀ), a float32 scalar, or [E] of a stack: products of bfloat16, all else in float32.

    delta  [O, C] bfloat16, or [E, O, C]; copied where the bulk copy engine cannot read it as it
           lies
    gram   [C, C] float32, symmetric, or of a stack [G, C, C], which E is a multiple of: Δ after Δ
           meets the next, and the first after the last; only its upper half counts
    The same inputs give the same bits on the same device. Raises ValueError for what does not fit.
    """
    _check(delta, gram)
    if delta.dim() == 2:
        return gram_error(delta[None], gram, tiles=tiles)[0]
    tiles = tiles or _tiles(delta.device)
    count, rows, columns = delta.shape
    if not delta.numel():
        return torch.zeros(count, dtype=torch.float32, device=delta.device)
    gram = gram[None] if gram.dim() == 2 else gram
    if count > 1 and rows % tiles.block_k:
        # A step would reach into the rows of the next.
        met = [gram[number % len(gram)] for number in range(count)]
        return torch.stack([gram_error(d, g, tiles=tiles) for d, g in zip(delta, met, strict=True)])
    from triton.tools.tensor_descriptor import TensorDescriptor

    from compressor_kernels.search.gram_error_jit import gram_kernel

    work, most = _work(count, rows, columns, tiles, delta.device)
    make = torch.empty if len(work) == count * most else torch.zeros  # where some have fewer
    parts = make(count, most, dtype=torch.float32, device=delta.device)
    delta, gram = _copyable(delta[0] if count == 1 else delta.flatten(0, 1)), dense(gram)
    gram_kernel[(len(work),)](
        TensorDescriptor.from_tensor(delta, [tiles.block_k, tiles.block_m]),
        TensorDescriptor.from_tensor(delta, [tiles.block_k, tiles.block_n]),
        gram,
        work,
        parts,
        columns,
        len(gram),
        gram.stride(0),
        gram.stride(1),
        most,
        BM=tiles.block_m,
        BN=tiles.block_n,
        BK=tiles.block_k,
        ASM=delta.is_cuda,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return parts.sum(1)


def gram_error_ref(delta: Tensor, gram: Tensor) -> Tensor:
    """`gram_error` in plain PyTorch, in float64."""
    _check(delta, gram)
    wide, upper = delta.double(), gram.double().triu()
    if upper.dim() == 3:
        upper = upper.repeat(len(delta) // len(gram), 1, 1)
    return ((wide.mT @ wide) * (upper + upper.triu(1))).sum((-2, -1))


@lru_cache(maxsize=64)
def _work(
    count: int, rows: int, columns: int, tiles: GramTiles, device: torch.device
) -> tuple[Tensor, int]:
    """What each program does: row and column of its tile, first and last step, which of `count` Δ
    it is of, and its number among those of that one; int32 [programs, 6], and how many these are at
    most.

    Programs run a device full at a time. Tiles that would leave the last round mostly empty are cut
    into ranges of Δ's rows, whose sums add up, so that it is full and short.
    """
    tall, wide = tiles.block_m, tiles.block_n
    places = [
        (number, row // tall, column // wide)
        for number in range(count)
        for band in range(0, columns, BAND)
        for row in range(0, min(band + BAND, columns), tall)
        for column in range(band, min(band + BAND, columns), wide)
        if column + wide > row
    ]
    places_at_once = processors(device) * tiles.resident
    steps = -(-rows // tiles.block_k)
    left = len(places) % places_at_once
    pieces = min(places_at_once // left, steps) if left else 1
    each = -(-steps // pieces)
    whole = len(places) - left
    work = [(*place, 0, steps) for place in places[:whole]]
    for first in range(0, steps, each):
        work += [(*place, first, min(first + each, steps)) for place in places[whole:]]
    made = [0] * count
    programs = []
    for number, row, column, first, last in work:
        steps_before = number * steps
        steps_of = (steps_before + first, steps_before + last)
        programs.append((row, column, *steps_of, number, made[number]))
        made[number] += 1
    return torch.tensor(programs, dtype=torch.int32, device=device), max(made)


@lru_cache(maxsize=64)
def _tiles(device: torch.device) -> GramTiles:
    tiles = GramTiles()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # AMD's devices do not say, and have little.
        if getattr(properties, "shared_memory_per_block_optin", 0) < tiles.shared_bytes + 1024:
            return SMALL_TILES
    return tiles


def _copyable(delta: Tensor) -> Tensor:
    """Δ itself if the bulk copy engine can read it, or a copy whose rows are whole 16 bytes."""
    rows, columns = delta.shape
    step, one = delta.stride()
    if one == 1 and step % 8 == 0 and step >= columns and delta.data_ptr() % 16 == 0:
        return delta
    padded = delta.new_empty(rows, -(-columns // 8) * 8)
    padded[:, :columns] = delta
    return padded[:, :columns]


def _check(delta: Tensor, gram: Tensor) -> None:
    columns = delta.shape[-1]
    fits = delta.dim() in (2, 3) and gram.dim() in (2, delta.dim())
    fits = fits and gram.shape[-2:] == (columns, columns)
    if not fits or (gram.dim() == 3 and len(delta) % max(len(gram), 1)):
        raise ValueError(f"Δ {list(delta.shape)} and a Gram matrix {list(gram.shape)} do not fit")
    if delta.dtype != torch.bfloat16 or gram.dtype != torch.float32:
        raise ValueError(f"Δ in {delta.dtype}, Gram matrix in {gram.dtype}: bfloat16 and float32")
    if delta.device != gram.device:
        raise ValueError(f"Δ on {delta.device}, Gram matrix on {gram.device}")
