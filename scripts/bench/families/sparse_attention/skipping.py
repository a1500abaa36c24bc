"""BLASST: tiles that hold too little for a softmax are skipped."""

from collections.abc import Iterator

import torch
from case import Case, Setup, first_rows, nbytes
from compressor_kernels.attention.head_attention import full_decode_ref
from compressor_kernels.attention.skip_softmax import Skipped, SkipTiles, skip_decode
from torch import Tensor


def hot_keys(q: Tensor, k: Tensor, size: int) -> None:
    """Have three of ten tiles of keys, the first among them, hold all that queries attend to."""
    q[..., 0], k[..., 0] = 16.0, 0.0
    hot = torch.rand(-(-k.shape[2] // size), device=k.device) < 0.3
    hot[0] = True
    k[:, :, :, 0] = (16.0 * hot.repeat_interleave(size)[: k.shape[2]]).to(k.dtype)


def skipped(done: Skipped, groups: int) -> str:
    """Counters: tiles that all query heads of a KV head skip, of those that are gone through."""
    tiles = done.tiles.unflatten(1, (groups, -1))
    visited = (tiles >= 0).any(2)
    share = ((tiles == 1).all(2) & visited).sum() / visited.sum()
    return f"{float(share):.1%} of {int(visited.sum())} tiles skipped"


def skipping_steps(setup: Setup) -> Iterator[Case]:
    *sides, size = setup.pick((8, 32, 8, 65536, 128, 128), (2, 4, 2, 512, 32, 16))
    step = setup.heads(*sides)
    hot_keys(step.q, step.k, size)

    def decode() -> Skipped:
        tiles = SkipTiles(keys=size, num_warps=4)
        return skip_decode(step.q, step.k, step.v, threshold=1e-3, tiles=tiles)

    yield Case(
        "BLASST, decode",
        lambda i: decode().out,
        lambda: full_decode_ref(*step.first),
        shape=step.shape,
        limit=2e-2,
        error=first_rows,
        moved=nbytes(step.k, step.v),
        peers={"our full decode": step.full},
        targets={"our full decode": 1.3},
        note=lambda: skipped(decode(), step.k.shape[1]),
    )
