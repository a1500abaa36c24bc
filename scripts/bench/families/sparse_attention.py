"""Sparse attention at 32/8 heads of 128: XAttention, BLASST, LServe, MoBA and SparseSpec.

Prompts of 64k tokens, batch 1, beside PyTorch's own attention; steps at batch 8 beside our full
decode. Density is of causal tiles, and a tile counts as skipped only where all query heads of its
KV head skip it: choices here are alike in the heads of a KV head.
"""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, different, first_rows, nbytes, relative_error
from compressor_kernels.attention import block_routing, skip_softmax, verify_attention
from compressor_kernels.attention.antidiagonal import (
    antidiagonal_sums,
    antidiagonal_sums_ref,
    covering_blocks,
    covering_blocks_ref,
)
from compressor_kernels.attention.block_attention import (
    BlockTiles,
    block_attention,
    block_attention_ref,
)
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    full_decode,
    full_decode_ref,
    head_decode,
    head_decode_ref,
    head_order,
    head_prefill,
)
from compressor_kernels.attention.quantized_cache import (
    CacheTiles,
    kv4_decode,
    kv4_decode_ref,
    kv8_decode,
    kv8_decode_ref,
    quantize_kv4,
    quantize_kv8,
)
from compressor_kernels.attention.tile_attention import (
    TileShape,
    density,
    tile_attention,
    tile_attention_ref,
)
from families.head_attention import backend
from torch import Tensor
from torch.nn.attention import SDPBackend

LAST = 64
"""Queries of a prompt that are held against a reference."""
SKIP = [
    skip_softmax.SkipTiles(rows, keys, warps, 3, per_sm)
    for rows, keys, warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4))
    for per_sm in (4, 8)
]

SHAPES = [TileShape(block_n, stages) for block_n in (64, 128) for stages in (2, 3)]
ROUTES = [
    block_routing.RouteTiles(rows, 1024, warps, stages)
    for rows, warps in ((128, 8), (64, 4))
    for stages in (1, 2, 3)
]
SHARES = [verify_attention.ShareTiles(*x) for x in ((8, 2), (8, 4), (16, 2), (32, 4), (32, 8))]
GATHERS = [
    BlockTiles(block_n, warps, stages, per_sm)
    for block_n, warps in ((16, 1), (32, 2), (32, 4), (64, 4), (128, 8))
    for stages in (3, 4)
    for per_sm in (4, 8)
]


def last(out: Tensor, want: Tensor) -> float:
    return relative_error(out[:, :, -want.shape[2] :], want)


def cases(setup: Setup) -> Iterator[Case]:
    yield from prompts(setup)
    yield from skipping_steps(setup)
    yield from pages(setup)
    yield from quantized_pages(setup)
    yield from drafts(setup)


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
    for stride in (8, 16):
        where = {"block_size": block, "stride": stride if not setup.tiny else 4}
        yield Case(
            f"XAttention's estimate, stride {stride}",
            shape,
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

        yield Case(
            f"XAttention, estimate of stride {stride}, choice and tiles",
            shape,
            estimated,
            lambda: tile_attention_ref(
                q[:, :, -queries:], k, v, chosen[:, :, -1:], block_size=block
            ),
            limit=6e-3,
            error=last,
            peers=peers,
            targets={"PyTorch cuDNN": 2.0},
            note=lambda: said,
        )
    yield Case(
        "prefill over chosen tiles alone",
        shape,
        lambda i, tiles=None: tile_attention(q, k, v, chosen, block_size=block, tiles=tiles),
        lambda: tile_attention_ref(q[:, :, -queries:], k, v, chosen[:, :, -1:], block_size=block),
        limit=6e-3,
        error=last,
        peers=peers,
        note=lambda: said,
        tiles=SHAPES if not setup.tiny else (),
    )
    sums = setup.rand(1, heads, count, count).tril()
    yield Case(
        "XAttention's choice alone",
        shape,
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

    yield Case(
        f"MoBA, {rule.top_k} blocks of {block}",
        shape,
        lambda i: block_routing.routed_attention(q, k, v, choose(), block_size=block),
        lambda: block_attention_ref(
            q[:, :, -queries:], k, v, choose()[:, :, -queries:], block_size=block
        ),
        limit=2e-2,
        error=last,
        peers=peers,
        targets={"PyTorch cuDNN": 5.0},
    )
    blocks = choose()
    yield Case(
        "MoBA's gate and choice alone",
        shape,
        lambda i: choose(),
        lambda: blocks,
        limit=0.0,
        error=lambda out, want: different([out], [want]),
    )
    routed = block_routing.route_ref(blocks[:, :1], count)
    yield Case(
        "MoBA's queries by block alone",
        shape,
        lambda i: block_routing.route(blocks, count),
        lambda: routed,
        limit=0.0,
        error=lambda out, want: different(
            [out.offsets[:, :1], out.counts[:, :1]], [want.offsets, want.counts]
        ),
        peers={"by a sort": Peer(lambda i: block_routing.route_ref(blocks, count))},
    )
    yield Case(
        "MoBA, attention without the gate",
        shape,
        lambda i, tiles=None: block_routing.routed_attention(
            q, k, v, blocks, block_size=block, tiles=tiles
        ),
        lambda: block_attention_ref(
            q[:, :, -queries:], k, v, blocks[:, :, -queries:], block_size=block
        ),
        limit=2e-2,
        error=last,
        peers=peers,
        tiles=ROUTES if not setup.tiny else (),
    )
    hot_keys(q, k, block)
    tiles = skip_softmax.SkipTiles(rows=block, keys=block)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    yield Case(
        "BLASST, prefill",
        shape,
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
        f"{batch}x{heads}/{groups}x{tokens}",
        lambda i, tiles=tiles: skip_softmax.skip_decode(q, k, v, threshold=1e-3, tiles=tiles).out,
        lambda: full_decode_ref(q[:1], k[:1], v[:1]),
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


def pages(setup: Setup) -> Iterator[Case]:
    """LServe: selection in every step, and the mixed decode."""
    batch, heads, groups, dim, tokens, page, logical, budget = setup.pick(
        (8, 32, 8, 128, 131072, 64, 16, 4096), (2, 4, 2, 32, 512, 16, 4, 64)
    )
    q = setup.randn(batch, heads, 1, dim)
    k, v = (setup.randn(batch, groups, tokens, dim) for _ in range(2))
    rule = BlockRule(block_size=page, init_blocks=0, local_blocks=0, top_k=budget // page)
    low, high = page_bounds(k, page_size=logical)
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    peers = {"our full decode": Peer(lambda i: full_decode(q, k, v))}
    own = DecodeTiles(block_n=min(64, page))
    group = heads // groups
    for paged, target in ((groups, 7.0), (groups // 2, 12.0)):
        order = head_order(torch.arange(groups, device=setup.device) >= paged)
        near = [setup.randn(batch, groups - paged, 8 * page, dim) for _ in range(2)]
        full = [k[:, :paged], v[:, :paged]]

        def choose(paged: int = paged) -> Tensor:
            scores = page_scores(
                q[:, : paged * group],
                low[:, :paged],
                high[:, :paged],
                group_max=True,
                per_page=page // logical,
            )
            return top_blocks(scores, rule, tokens=tokens)[:, :, 0]

        def step(
            i: int, tiles: DecodeTiles = own, choose=choose, full=full, near=near, order=order
        ) -> Tensor:  # type: ignore[no-untyped-def]
            return head_decode(
                q, *full, *near, order=order, blocks=choose(), block_size=page, tiles=tiles
            )

        def exact(choose=choose, full=full, near=near, order=order) -> Tensor:  # type: ignore[no-untyped-def]
            first = [x[:1] for x in (q, *full, *near)]
            return head_decode_ref(*first, order=order, blocks=choose()[:1], block_size=page)

        name = "all heads paged" if paged == groups else "half of the heads streaming"
        yield Case(
            f"LServe, choice and step, {name}",
            shape,
            step,
            exact,
            limit=6e-3,
            error=first_rows,
            peers=peers,
            targets={"our full decode": target},
        )
    blocks = choose_all(q, low, high, page // logical, rule, tokens)
    yield Case(
        "LServe's choice alone, all heads",
        shape,
        lambda i: choose_all(q, low, high, page // logical, rule, tokens),
        lambda: blocks,
        peers=peers,
    )


def quantized_pages(setup: Setup) -> Iterator[Case]:
    """The same pages out of 8-bit and 4-bit caches."""
    batch, heads, groups, dim, tokens, page, budget = setup.pick(
        (8, 32, 8, 128, 131072, 64, 4096), (2, 4, 2, 32, 512, 16, 64)
    )
    q = setup.randn(batch, heads, 1, dim)
    count = budget // page
    picked = torch.rand(batch, groups, tokens // page, device=setup.device).topk(count).indices
    blocks = picked.sort(-1).values.int()
    where = {"blocks": blocks, "block_size": page}
    first = {"blocks": blocks[:1], "block_size": page}
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    scale = torch.tensor([0.04], device=setup.device)
    shared = {"k_scale": scale, "v_scale": scale}
    codes = [
        quantize_kv8(setup.randn(batch, groups, tokens, dim), scale, dtype=torch.int8)
        for _ in range(2)
    ]
    tiles = CacheTiles(block_n=min(64, page))
    yield Case(
        "8-bit cache, chosen pages",
        shape,
        lambda i: kv8_decode(q, *codes, **shared, **where, tiles=tiles),
        lambda: kv8_decode_ref(q[:1], *(x[:1] for x in codes), **shared, **first),
        limit=1e-2,
        error=first_rows,
        peers={"our 8-bit full decode": Peer(lambda i: kv8_decode(q, *codes, **shared))},
    )
    halves = [quantize_kv4(setup.randn(batch, groups, tokens, dim)) for _ in range(2)]
    packed = [x for x, _ in halves]
    params = dict(zip(("k_params", "v_params"), (p for _, p in halves), strict=True))
    yield Case(
        "4-bit cache, chosen pages",
        shape,
        lambda i: kv4_decode(q, *packed, **params, **where),
        lambda: kv4_decode_ref(
            q[:1], *(x[:1] for x in packed), **{n: p[:1] for n, p in params.items()}, **first
        ),
        limit=1e-2,
        error=first_rows,
        peers={"our 4-bit full decode": Peer(lambda i: kv4_decode(q, *packed, **params))},
    )


def choose_all(
    q: Tensor, low: Tensor, high: Tensor, per_page: int, rule: BlockRule, tokens: int
) -> Tensor:
    scores = page_scores(q, low, high, group_max=True, per_page=per_page)
    return top_blocks(scores, rule, tokens=tokens)[:, :, 0].contiguous()


def drafts(setup: Setup) -> Iterator[Case]:
    """SparseSpec: eight draft steps and the choice that they need, beside eight full steps."""
    batch, heads, groups, dim, tokens, stride = setup.pick(
        (8, 32, 8, 128, 65536, 8), (2, 4, 2, 32, 512, 2)
    )
    budget = tokens // 20
    q = setup.randn(batch, heads, stride + 1, dim)
    k, v = (setup.randn(batch, groups, tokens, dim) for _ in range(2))
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    one = q[:, :, :1].contiguous()
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    done = verify_attention.verify_attention(q, k, v)

    # The token that is drafted, too, which is the last and newer than the choice.
    where = {"length": tokens, "recent": stride + 3, "budget": budget + 1}

    def choose(tiles: verify_attention.ShareTiles | None = None) -> Tensor:
        shares = verify_attention.key_shares(done, tiles=tiles)
        return verify_attention.critical_keys(shares, **where)[:, :, None]

    chosen, shares = choose(), verify_attention.key_shares(done)

    def round_of_drafts(i: int) -> Tensor:
        keys = choose()
        for _ in range(stride):
            out = block_attention(one, k, v, keys, block_size=1)
        return out

    def full_steps(i: int) -> None:
        for _ in range(stride):
            full_decode(one, k, v)

    want = partial(block_attention_ref, one[:1], k[:1], v[:1], chosen[:1], block_size=1)
    yield Case(
        f"SparseSpec, {stride} draft steps over {budget} keys and their choice",
        shape,
        round_of_drafts,
        want,
        limit=6e-3,
        error=first_rows,
        peers={"as many full steps": Peer(full_steps)},
        targets={"as many full steps": 10.0},
        note=lambda: "verification, which leaves its scores, is timed below",
    )
    yield Case(
        "SparseSpec's choice alone, shares of keys included",
        shape,
        lambda i, tiles=None: choose(tiles),
        lambda: verify_attention.critical_keys_ref(shares, **where)[:, :, None],
        limit=0.0,
        error=lambda out, want: different([out], [want]),
        tiles=SHARES if not setup.tiny else (),
    )
    yield Case(
        "SparseSpec's shares alone",
        shape,
        lambda i, tiles=None: verify_attention.key_shares(done, tiles=tiles),
        lambda: verify_attention.key_shares_ref(q[:1], k[:1]),
        limit=1e-2,
        error=first_rows,
        moved=nbytes(done.kept, done.tops, shares),
        tiles=SHARES if not setup.tiny else (),
    )
    yield Case(
        "SparseSpec's best keys alone",
        shape,
        lambda i: verify_attention.critical_keys(shares, **where),
        lambda: verify_attention.critical_keys_ref(shares, **where),
        limit=0.0,
        error=lambda out, want: different([out], [want]),
        peers={"by a sort": Peer(lambda i: verify_attention.critical_keys_ref(shares, **where))},
    )
    yield Case(
        "SparseSpec, a draft step alone",
        shape,
        lambda i, tiles=None: block_attention(one, k, v, chosen, block_size=1, tiles=tiles),
        want,
        limit=6e-3,
        error=first_rows,
        peers={"our full decode": Peer(lambda i: full_decode(one, k, v))},
        tiles=GATHERS if not setup.tiny else (),
    )
    yield Case(
        f"SparseSpec, verification of {stride + 1} tokens",
        shape,
        lambda i: verify_attention.verify_attention(q, k, v).out,
        lambda: head_prefill(q, k, v, streaming=none, sink=0, window=1),
        limit=1e-2,
        moved=nbytes(k, v),
        peers={"our full decode": Peer(lambda i: full_decode(one, k, v))},
    )
