"""LServe: steps over chosen pages of a cache, whole and quantized."""

from collections.abc import Iterator

import torch
from case import Case, Peer, Setup, first_rows
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    full_decode,
    head_decode,
    head_decode_ref,
    head_order,
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
from torch import Tensor


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
            step,
            exact,
            shape=shape,
            limit=6e-3,
            error=first_rows,
            peers=peers,
            targets={"our full decode": target},
        )
    blocks = choose_all(q, low, high, page // logical, rule, tokens)
    yield Case(
        "LServe's choice alone, all heads",
        lambda i: choose_all(q, low, high, page // logical, rule, tokens),
        lambda: blocks,
        shape=shape,
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
        lambda i: kv8_decode(q, *codes, **shared, **where, tiles=tiles),
        lambda: kv8_decode_ref(q[:1], *(x[:1] for x in codes), **shared, **first),
        shape=shape,
        limit=1e-2,
        error=first_rows,
        peers={"our 8-bit full decode": Peer(lambda i: kv8_decode(q, *codes, **shared))},
    )
    halves = [quantize_kv4(setup.randn(batch, groups, tokens, dim)) for _ in range(2)]
    packed = [x for x, _ in halves]
    params = dict(zip(("k_params", "v_params"), (p for _, p in halves), strict=True))
    yield Case(
        "4-bit cache, chosen pages",
        lambda i: kv4_decode(q, *packed, **params, **where),
        lambda: kv4_decode_ref(
            q[:1], *(x[:1] for x in packed), **{n: p[:1] for n, p in params.items()}, **first
        ),
        shape=shape,
        limit=1e-2,
        error=first_rows,
        peers={"our 4-bit full decode": Peer(lambda i: kv4_decode(q, *packed, **params))},
    )


def choose_all(
    q: Tensor, low: Tensor, high: Tensor, per_page: int, rule: BlockRule, tokens: int
) -> Tensor:
    scores = page_scores(q, low, high, group_max=True, per_page=per_page)
    return top_blocks(scores, rule, tokens=tokens)[:, :, 0].contiguous()
