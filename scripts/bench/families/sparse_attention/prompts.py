"""XAttention, BLASST and MoBA over long prompts."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, different, relative_error
from compressor_kernels.attention import block_routing, skip_softmax
from compressor_kernels.attention.antidiagonal import (
    antidiagonal_sums,
    antidiagonal_sums_ref,
    covering_blocks,
    covering_blocks_ref,
)
from compressor_kernels.attention.block_attention import (
    block_attention_ref,
)
from compressor_kernels.attention.block_selection import BlockRule
from compressor_kernels.attention.head_attention import (
    head_prefill,
)
from compressor_kernels.attention.tile_attention import (
    TileShape,
    density,
    tile_attention,
    tile_attention_ref,
)
from families.head_attention import backend
from families.sparse_attention.skipping import SKIP, hot_keys, skipped
from torch import Tensor
from torch.nn.attention import SDPBackend

LAST = 64
"""Queries of a prompt that are held against a reference."""
SHAPES = [TileShape(block_n, stages) for block_n in (64, 128) for stages in (2, 3)]
ROUTES = [
    block_routing.RouteTiles(rows, 1024, warps, stages)
    for rows, warps in ((128, 8), (64, 4))
    for stages in (1, 2, 3)
]


def last(out: Tensor, want: Tensor) -> float:
    return relative_error(out[:, :, -want.shape[2] :], want)


def prompts(setup: Setup) -> Iterator[Case]:
    """XAttention, BLASST and MoBA over a long prompt."""
    heads, groups, dim, tokens, block = setup.pick((32, 8, 128, 65536, 128), (4, 2, 32, 256, 16))
    queries = min(LAST, block)
    shape = f"{heads}/{groups}x{tokens}"
    q = setup.randn(1, heads, tokens, dim)
    k, v = (setup.randn(1, groups, tokens, dim) for _ in range(2))
    peers = {
        "PyTorch flash": Peer(backend(SDPBackend.FLASH_ATTENTION, q, k, v)),
        "PyTorch cuDNN": Peer(backend(SDPBackend.CUDNN_ATTENTION, q, k, v)),
    }
    share = torch.full((heads,), 0.5, device=setup.device)
    count = tokens // block
    row = torch.arange(count, device=setup.device)[:, None]
    wanted = torch.rand(1, groups, count, count, device=setup.device) < 0.2
    diagonal = (row == row.T) | (row.T == 0)
    chosen = ((wanted | diagonal) & (row >= row.T)).repeat_interleave(heads // groups, dim=1)
    said = f"{float(density(chosen, kv_heads=groups).mean()):.1%} of causal tiles"
    case = partial(Case, shape=shape)
    attends = partial(case, limit=2e-2, error=last, peers=peers)
    for stride in (8, 16):
        where = {"block_size": block, "stride": stride if not setup.tiny else 4}
        yield case(
            f"XAttention's estimate, stride {stride}",
            lambda i, where=where: antidiagonal_sums(q, k, **where),
            lambda where=where: antidiagonal_sums_ref(q[:, :2], k[:, :1], **where),
            limit=2e-2,
            error=lambda out, want: relative_error(out[:, :2], want),
            peers=peers,
            targets={"PyTorch cuDNN": 1 / 0.15},
        )

        def estimated(i: int, where: dict[str, int] = where) -> Tensor:
            """Its own choice is made and dropped: random queries would choose nearly all."""
            covering_blocks(antidiagonal_sums(q, k, **where), share)
            return tile_attention(q, k, v, chosen, block_size=block)

        yield attends(
            f"XAttention, estimate of stride {stride}, choice and tiles",
            estimated,
            lambda: tile_attention_ref(
                q[:, :, -queries:], k, v, chosen[:, :, -1:], block_size=block
            ),
            limit=6e-3,
            targets={"PyTorch cuDNN": 2.0},
            note=lambda: said,
        )
    yield attends(
        "prefill over chosen tiles alone",
        lambda i, tiles=None: tile_attention(q, k, v, chosen, block_size=block, tiles=tiles),
        lambda: tile_attention_ref(q[:, :, -queries:], k, v, chosen[:, :, -1:], block_size=block),
        limit=6e-3,
        note=lambda: said,
        tiles=SHAPES if not setup.tiny else (),
    )
    sums = setup.rand(1, heads, count, count).tril()
    yield case(
        "XAttention's choice alone",
        lambda i: covering_blocks(sums, share),
        lambda: covering_blocks_ref(sums, share),
        limit=0.0,
        error=lambda out, want: different([out], [want]),
        peers={"by a sort": Peer(lambda i: covering_blocks_ref(sums, share))},
    )
    rule = BlockRule(block_size=block, init_blocks=0, local_blocks=0, top_k=setup.pick(8, 3))

    def choose() -> Tensor:
        means = block_routing.mean_keys(k, block_size=block)
        return block_routing.gated_blocks(q, means, rule, tokens=tokens)

    yield attends(
        f"MoBA, {rule.top_k} blocks of {block}",
        lambda i: block_routing.routed_attention(q, k, v, choose(), block_size=block),
        lambda: block_attention_ref(
            q[:, :, -queries:], k, v, choose()[:, :, -queries:], block_size=block
        ),
        targets={"PyTorch cuDNN": 5.0},
    )
    blocks = choose()
    yield case(
        "MoBA's gate and choice alone",
        lambda i: choose(),
        lambda: blocks,
        limit=0.0,
        error=lambda out, want: different([out], [want]),
    )
    routed = block_routing.route_ref(blocks[:, :1], count)
    yield case(
        "MoBA's queries by block alone",
        lambda i: block_routing.route(blocks, count),
        lambda: routed,
        limit=0.0,
        error=lambda out, want: different(
            [out.offsets[:, :1], out.counts[:, :1]], [want.offsets, want.counts]
        ),
        peers={"by a sort": Peer(lambda i: block_routing.route_ref(blocks, count))},
    )
    yield attends(
        "MoBA, attention without the gate",
        lambda i, tiles=None: block_routing.routed_attention(
            q, k, v, blocks, block_size=block, tiles=tiles
        ),
        lambda: block_attention_ref(
            q[:, :, -queries:], k, v, blocks[:, :, -queries:], block_size=block
        ),
        tiles=ROUTES if not setup.tiny else (),
    )
    hot_keys(q, k, block)
    tiles = skip_softmax.SkipTiles(rows=block, keys=block)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    yield case(
        "BLASST, prefill",
        lambda i, tiles=tiles: skip_softmax.skip_prefill(q, k, v, threshold=1e-3, tiles=tiles).out,
        lambda: head_prefill(q, k, v, streaming=none, sink=0, window=1)[:, :, -queries:],
        limit=2e-2,
        error=last,
        peers={
            "our dense": Peer(lambda i: head_prefill(q, k, v, streaming=none, sink=0, window=1)),
            **peers,
        },
        targets={"our dense": 1.3},
        tiles=SKIP if not setup.tiny else (),
        note=lambda: skipped(
            skip_softmax.skip_prefill(q, k, v, threshold=1e-3, tiles=tiles), groups
        ),
    )
