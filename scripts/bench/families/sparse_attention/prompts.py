"""XAttention, BLASST and MoBA over long prompts."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, different, last_queries, relative_error
from compressor_kernels.attention import antidiagonal, block_routing
from compressor_kernels.attention.block_attention import block_attention_ref
from compressor_kernels.attention.block_selection import BlockRule
from compressor_kernels.attention.head_attention import head_prefill
from compressor_kernels.attention.skip_softmax import Skipped, SkipTiles, skip_prefill
from compressor_kernels.attention.tile_attention import density, tile_attention, tile_attention_ref
from families.head_attention import dense
from families.sparse_attention.skipping import hot_keys, skipped
from torch import Tensor

LAST = 64
"""Queries of a prompt that are held against a reference."""


def prompts(setup: Setup) -> Iterator[Case]:
    """XAttention, BLASST and MoBA over a long prompt."""
    heads, groups, dim, tokens, block = setup.pick((32, 8, 128, 65536, 128), (4, 2, 32, 256, 16))
    queries = min(LAST, block)
    prompt = setup.heads(1, heads, groups, tokens, dim, queries=tokens)
    q, k, v = prompt.q, prompt.k, prompt.v
    end, size = (q[:, :, -queries:], k, v), {"block_size": block}
    peers = dense(prompt)
    case = partial(Case, shape=f"{heads}/{groups}x{tokens}")
    attends = partial(case, limit=2e-2, error=last_queries, peers=peers)
    same = partial(case, limit=0.0, error=different)

    share = torch.full((heads,), 0.5, device=setup.device)
    count = tokens // block
    row = torch.arange(count, device=setup.device)[:, None]
    wanted = torch.rand(1, groups, count, count, device=setup.device) < 0.2
    diagonal = (row == row.T) | (row.T == 0)
    chosen = ((wanted | diagonal) & (row >= row.T)).repeat_interleave(heads // groups, dim=1)
    said = f"{float(density(chosen, kv_heads=groups).mean()):.1%} of causal tiles"
    tiled = partial(tile_attention_ref, *end, chosen[:, :, -1:], **size)
    for stride in (8, 16):
        where = {**size, "stride": setup.pick(stride, 4)}
        yield case(
            f"XAttention's estimate, stride {stride}",
            lambda i, where=where: antidiagonal.antidiagonal_sums(q, k, **where),
            partial(antidiagonal.antidiagonal_sums_ref, q[:, :2], k[:, :1], **where),
            limit=2e-2,
            error=lambda out, want: relative_error(out[:, :2], want),
            peers=peers,
            targets={"PyTorch cuDNN": 1 / 0.15},
        )

        def estimated(i: int, where: dict[str, int] = where) -> Tensor:
            """Its own choice is made and dropped: random queries would choose nearly all."""
            antidiagonal.covering_blocks(antidiagonal.antidiagonal_sums(q, k, **where), share)
            return tile_attention(q, k, v, chosen, **size)

        yield attends(
            f"XAttention, estimate of stride {stride}, choice and tiles",
            estimated,
            tiled,
            limit=6e-3,
            targets={"PyTorch cuDNN": 2.0},
            note=lambda: said,
        )
    yield attends(
        "prefill over chosen tiles alone",
        lambda i: tile_attention(q, k, v, chosen, **size),
        tiled,
        limit=6e-3,
        note=lambda: said,
    )
    sums = setup.rand(1, heads, count, count).tril()
    covering = partial(antidiagonal.covering_blocks_ref, sums, share)
    yield same(
        "XAttention's choice alone",
        lambda i: antidiagonal.covering_blocks(sums, share),
        covering,
        peers={"by a sort": Peer(lambda i: covering())},
    )
    rule = BlockRule(block_size=block, init_blocks=0, local_blocks=0, top_k=setup.pick(8, 3))

    def choose() -> Tensor:
        means = block_routing.mean_keys(k, **size)
        return block_routing.gated_blocks(q, means, rule, tokens=tokens)

    blocks = choose()
    exact = partial(block_attention_ref, *end, blocks[:, :, -queries:], **size)
    yield attends(
        f"MoBA, {rule.top_k} blocks of {block}",
        lambda i: block_routing.routed_attention(q, k, v, choose(), **size),
        exact,
        targets={"PyTorch cuDNN": 5.0},
    )
    yield same("MoBA's gate and choice alone", lambda i: choose(), lambda: blocks)
    routed = block_routing.route_ref(blocks[:, :1], count)
    yield same(
        "MoBA's queries by block alone",
        lambda i: block_routing.route(blocks, count),
        lambda: routed,
        error=lambda out, want: different(
            [out.offsets[:, :1], out.counts[:, :1]], [want.offsets, want.counts]
        ),
        peers={"by a sort": Peer(lambda i: block_routing.route_ref(blocks, count))},
    )
    yield attends(
        "MoBA, attention without the gate",
        lambda i: block_routing.routed_attention(q, k, v, blocks, **size),
        exact,
    )
    hot_keys(q, k, block)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)

    def whole(i: int = 0) -> Tensor:
        return head_prefill(q, k, v, streaming=none, sink=0, window=1)

    def skipping() -> Skipped:
        return skip_prefill(q, k, v, threshold=1e-3, tiles=SkipTiles(rows=block, keys=block))

    yield attends(
        "BLASST, prefill",
        lambda i: skipping().out,
        lambda: whole()[:, :, -queries:],
        peers={"our dense": Peer(whole), **peers},
        targets={"our dense": 1.3},
        note=lambda: skipped(skipping(), groups),
    )
