"""LServe: steps over chosen pages of a cache, whole and quantized."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from case import Case, Peer, Setup, first_rows
from compressor_kernels.attention import quantized_cache as cache
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    head_decode,
    head_decode_ref,
    head_order,
)
from torch import Tensor

FULL, TINY = ((8, 32, 8, 131072, 128), 64, 16, 4096), ((2, 4, 2, 512, 32), 16, 4, 64)


def pages(setup: Setup) -> Iterator[Case]:
    """LServe: selection in every step, and the mixed decode."""
    sides, page, logical, budget = setup.pick(FULL, TINY)
    step = setup.heads(*sides)
    batch, heads, groups, tokens, dim = sides
    rule = BlockRule(block_size=page, init_blocks=0, local_blocks=0, top_k=budget // page)
    low, high = page_bounds(step.k, page_size=logical)
    case = partial(Case, shape=step.shape, peers={"our full decode": step.full})
    how = {"block_size": page}

    def choose(paged: int = groups) -> Tensor:
        """Pages of the first KV heads."""
        scores = page_scores(
            step.q[:, : paged * heads // groups], low[:, :paged], high[:, :paged],
            group_max=True, per_page=page // logical,
        )  # fmt: skip
        return top_blocks(scores, rule, tokens=tokens)[:, :, 0].contiguous()

    for paged, target in ((groups, 7.0), (groups // 2, 12.0)):
        order = head_order(torch.arange(groups, device=setup.device) >= paged)
        near = [setup.randn(batch, groups - paged, 8 * page, dim) for _ in range(2)]
        kept = [step.q, step.k[:, :paged], step.v[:, :paged], *near]
        where = {**how, "order": order}
        own = {**where, "tiles": DecodeTiles(block_n=min(64, page))}
        name = "all heads paged" if paged == groups else "half of the heads streaming"
        yield case(
            f"LServe, choice and step, {name}",
            lambda i, x=kept, n=paged, own=own: head_decode(*x, blocks=choose(n), **own),
            lambda x=kept, n=paged, where=where: head_decode_ref(
                *(part[:1] for part in x), blocks=choose(n)[:1], **where
            ),
            limit=6e-3,
            error=first_rows,
            targets={"our full decode": target},
        )
    blocks = choose()
    yield case("LServe's choice alone, all heads", lambda i: choose(), lambda: blocks)


def quantized_pages(setup: Setup) -> Iterator[Case]:
    """The same pages out of 8-bit and 4-bit caches."""
    sides, page, _, budget = setup.pick(FULL, TINY)
    step = setup.heads(*sides)
    room = torch.rand(sides[0], sides[2], sides[3] // page, device=setup.device)
    blocks = room.topk(budget // page).indices.sort(-1).values.int()
    scale = torch.tensor([0.04], device=setup.device)
    scales = {"k_scale": scale, "v_scale": scale}
    codes = [cache.quantize_kv8(x, scale, dtype=torch.int8) for x in (step.k, step.v)]
    (k4, k_params), (v4, v_params) = (cache.quantize_kv4(x) for x in (step.k, step.v))
    params = {"k_params": k_params, "v_params": v_params}

    def case(bits: int, decode: Any, exact: Any, kept: Any, more: dict[str, Tensor]) -> Case:
        of_first = {name: x[:1] for name, x in more.items()}
        return Case(
            f"{bits}-bit cache, chosen pages",
            lambda i: decode(step.q, *kept, **more, blocks=blocks, block_size=page),
            lambda: exact(
                step.q[:1], *(x[:1] for x in kept), **of_first, blocks=blocks[:1], block_size=page
            ),
            shape=step.shape,
            limit=1e-2,
            error=first_rows,
            peers={f"our {bits}-bit full decode": Peer(lambda i: decode(step.q, *kept, **more))},
        )

    yield case(8, cache.kv8_decode, cache.kv8_decode_ref, codes, scales)
    yield case(4, cache.kv4_decode, cache.kv4_decode_ref, [k4, v4], params)
