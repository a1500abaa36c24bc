"""BLASST: tiles that hold too little for a softmax are skipped."""

from collections.abc import Iterator

import torch
from case import Case, Peer, Setup, first_rows, nbytes
from compressor_kernels.attention import skip_softmax
from compressor_kernels.attention.head_attention import (
    full_decode,
    full_decode_ref,
)
from torch import Tensor

SKIP = [
    skip_softmax.SkipTiles(rows, keys, warps, 3, per_sm)
    for rows, keys, warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4))
    for per_sm in (4, 8)
]


def hot_keys(q: Tensor, k: Tensor, size: int) -> None:
    """Have three of ten tiles of keys, the first among them, hold all that queries attend to."""
    q[..., 0], k[..., 0] = 16.0, 0.0
    hot = torch.rand(-(-k.shape[2] // size), device=k.device) < 0.3
    hot[0] = True
    k[:, :, :, 0] = (16.0 * hot.repeat_interleave(size)[: k.shape[2]]).to(k.dtype)


def skipped(done: skip_softmax.Skipped, groups: int) -> str:
    """Counters: tiles that all query heads of a KV head skip, of those that are gone through."""
    tiles = done.tiles.unflatten(1, (groups, -1))
    visited = (tiles >= 0).any(2)
    share = ((tiles == 1).all(2) & visited).sum() / visited.sum()
    return f"{float(share):.1%} of {int(visited.sum())} tiles skipped"


def skipping_steps(setup: Setup) -> Iterator[Case]:
    batch, heads, groups, dim, tokens, size = setup.pick(
        (8, 32, 8, 128, 65536, 128), (2, 4, 2, 32, 512, 16)
    )
    q = setup.randn(batch, heads, 1, dim)
    k, v = (setup.randn(batch, groups, tokens, dim) for _ in range(2))
    hot_keys(q, k, size)
    tiles = skip_softmax.SkipTiles(keys=size, num_warps=4)
    yield Case(
        "BLASST, decode",
        lambda i, tiles=tiles: skip_softmax.skip_decode(q, k, v, threshold=1e-3, tiles=tiles).out,
        lambda: full_decode_ref(q[:1], k[:1], v[:1]),
        shape=f"{batch}x{heads}/{groups}x{tokens}",
        limit=2e-2,
        error=first_rows,
        moved=nbytes(k, v),
        peers={"our full decode": Peer(lambda i: full_decode(q, k, v))},
        targets={"our full decode": 1.3},
        tiles=SKIP if not setup.tiny else (),
        note=lambda: skipped(
            skip_softmax.skip_decode(q, k, v, threshold=1e-3, tiles=tiles), groups
        ),
    )
