"""Sparse attention at 32/8 heads of 128: XAttention, BLASST, LServe, MoBA and SparseSpec.

Prompts of 64k tokens, batch 1, beside PyTorch's own attention; steps at batch 8 beside our full
decode. Density is of causal tiles, and a tile counts as skipped only where all query heads of its
KV head skip it: choices here are alike in the heads of a KV head.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from case import EXACT, Call, Case, Heads, Setup, first, nbytes
from compressor_kernels.attention import antidiagonal, block_routing
from compressor_kernels.attention import verify_attention as kernel
from compressor_kernels.attention.block_attention import block_attention, block_attention_ref
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    full_decode_ref,
    head_decode,
    head_decode_ref,
    head_order,
)
from compressor_kernels.attention.skip_softmax import Skipped, SkipTiles, skip_decode, skip_prefill
from compressor_kernels.attention.tile_attention import density, tile_attention, tile_attention_ref
from families.cache import over_caches
from families.head_attention import dense
from torch import Tensor


def cases(setup: Setup) -> Iterator[Case]:
    yield from prompts(setup)
    yield from skipping_steps(setup)
    yield from pages(setup)
    yield from quantized_pages(setup)
    yield from drafts(setup)


def prompts(setup: Setup) -> Iterator[Case]:
    """XAttention, BLASST and MoBA over a long prompt."""
    heads, groups, dim, tokens, block = setup.pick((32, 8, 128, 65536, 128), (4, 2, 32, 256, 16))
    last = min(64, block)  # queries that are held against a reference
    prompt = setup.heads(1, heads, groups, tokens, dim, queries=tokens)
    q, k, v = prompt.all
    end, size = (q[:, :, -last:], k, v), {"block_size": block}
    peers = dense(prompt)
    case = partial(Case, shape=f"{heads}/{groups}x{tokens}")
    attends = partial(case, limit=2e-2, peers=peers)

    share = torch.full((heads,), 0.5, device=setup.device)
    count = tokens // block
    row = torch.arange(count, device=setup.device)[:, None]
    wanted = torch.rand(1, groups, count, count, device=setup.device) < 0.2
    diagonal = (row == row.T) | (row.T == 0)
    chosen = ((wanted | diagonal) & (row >= row.T)).repeat_interleave(heads // groups, dim=1)
    for stride in (8, 16):
        how = {**size, "stride": setup.pick(stride, 4)}
        estimate = partial(antidiagonal.antidiagonal_sums, q, k, **how)
        yield attends(
            estimate,
            name=f"XAttention's estimate, stride {stride}",
            reference=partial(antidiagonal.antidiagonal_sums_ref, q[:, :2], k[:, :1], **how),
            targets={"PyTorch cuDNN": 1 / 0.15},
        )

        def estimated(estimate: Callable[[], Tensor] = estimate) -> Tensor:
            """Its own choice is made and dropped: random queries would choose nearly all."""
            antidiagonal.covering_blocks(estimate(), share)
            return tile_attention(q, k, v, chosen, **size)

        yield attends(
            estimated,
            name=f"XAttention, estimate of stride {stride}, choice and tiles",
            reference=lambda: tile_attention_ref(*end, chosen[:, :, -1:], **size),
            targets={"PyTorch cuDNN": 2.0},
            note=f"{float(density(chosen, kv_heads=groups).mean()):.1%} of causal tiles",
        )
    rule = BlockRule(block_size=block, init_blocks=0, local_blocks=0, top_k=setup.pick(8, 3))

    def choose() -> Tensor:
        means = block_routing.mean_keys(k, **size)
        return block_routing.gated_blocks(q, means, rule, tokens=tokens)

    blocks = choose()[:, :, -last:]
    yield attends(
        lambda: block_routing.routed_attention(q, k, v, choose(), **size),
        name=f"MoBA, {rule.top_k} blocks of {block}",
        reference=lambda: block_attention_ref(*end, blocks, **size),
        targets={"PyTorch cuDNN": 5.0},
    )
    hot_keys(q, k, block)
    tiles = SkipTiles(rows=block, keys=block)
    skipping = partial(skip_prefill, q, k, v, threshold=1e-3, tiles=tiles)
    yield attends(
        lambda: skipping().out,
        name="BLASST, prefill",
        reference=lambda: prompt.prefill()[:, :, -last:],
        peers={"our dense": prompt.prefill, **peers},
        targets={"our dense": 1.3},
        note=skipped(skipping(), groups),
    )


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
    """BLASST: tiles that hold too little for a softmax are skipped."""
    *sides, size = setup.pick((8, 32, 8, 65536, 128, 128), (2, 4, 2, 512, 32, 16))
    step = setup.heads(*sides)
    hot_keys(step.q, step.k, size)
    decode = partial(skip_decode, threshold=1e-3, tiles=SkipTiles(keys=size, num_warps=4))
    yield Case(
        lambda q, k, v: decode(q, k, v).out,
        [step.all],
        name="BLASST, decode",
        reference=first(full_decode_ref),
        shape=step.shape,
        limit=2e-2,
        peers={"our full decode": step.full},
        targets={"our full decode": 1.3},
        note=skipped(decode(*step.all), step.k.shape[1]),
    )


FULL, TINY = ((8, 32, 8, 131072, 128), 64, 16, 4096), ((2, 4, 2, 512, 32), 16, 4, 64)


def pages(setup: Setup) -> Iterator[Case]:
    """LServe: selection of pages in every step, and the mixed decode."""
    sides, page, logical, budget = setup.pick(FULL, TINY)
    step = setup.heads(*sides)
    batch, heads, groups, tokens, dim = sides
    rule = BlockRule(block_size=page, init_blocks=0, local_blocks=0, top_k=budget // page)
    bounds = page_bounds(step.k, page_size=logical)
    case = partial(Case, shape=step.shape, peers={"our full decode": step.full}, moved=0)
    best = {"group_max": True, "per_page": page // logical}

    def choose(paged: int = groups) -> Tensor:
        """Pages of the first KV heads."""
        parts = (step.q[:, : paged * heads // groups], *(side[:, :paged] for side in bounds))
        return top_blocks(page_scores(*parts, **best), rule, tokens=tokens)[:, :, 0].contiguous()

    def attend(decode: Callable[..., Tensor], *parts: Tensor, paged: int, **how: Any) -> Tensor:
        return decode(*parts, blocks=choose(paged), **how)

    ours = partial(head_decode, tiles=DecodeTiles(block_n=min(64, page)))
    for paged, target in ((groups, 7.0), (groups // 2, 12.0)):
        near = [setup.randn(batch, groups - paged, 8 * page, dim) for _ in range(2)]
        order = head_order(torch.arange(groups, device=setup.device) >= paged)
        name = "all heads paged" if paged == groups else "half of the heads streaming"
        yield case(
            partial(attend, ours),
            [(step.q, step.k[:, :paged], step.v[:, :paged], *near)],
            {"block_size": page, "order": order, "paged": paged},
            name=f"LServe, choice and step, {name}",
            reference=partial(attend, first(head_decode_ref)),
            limit=6e-3,
            targets={"our full decode": target},
        )


def quantized_pages(setup: Setup) -> Iterator[Case]:
    """The same pages out of quantized caches."""
    sides, page, _, budget = setup.pick(FULL, TINY)
    step = setup.heads(*sides)
    room = torch.rand(sides[0], sides[2], sides[3] // page, device=setup.device)
    blocks = room.topk(budget // page).indices.sort(-1).values.int()
    for name, call, reference in over_caches(step):
        yield Case(
            call.function,
            call.sets,
            {**call.how, "blocks": blocks, "block_size": page},
            name=f"{name}, chosen pages",
            reference=reference,
            shape=step.shape,
            limit=1e-2,
            moved=0,
            peers={f"our full decode of {name}": call},
        )


def drafts(setup: Setup) -> Iterator[Case]:
    """SparseSpec: eight draft steps over chosen keys and the choice that they need, which a
    verification leaves, beside eight full steps."""
    *sides, stride = setup.pick((8, 32, 8, 65536, 128, 8), (2, 4, 2, 512, 32, 2))
    batch, heads, _, tokens, dim = sides
    budget = tokens // 20
    step = setup.heads(*sides)
    q = setup.randn(batch, heads, stride + 1, dim)
    done = kernel.verify_attention(q, step.k, step.v)

    # The token that is drafted, too, which is the last and newer than the choice.
    where = {"length": tokens, "recent": stride + 3, "budget": budget + 1}
    choose = partial(kernel.verified_keys, done, **where)
    shares, chosen = kernel.key_shares(done), choose()[:, :, None]
    best = partial(kernel.critical_keys_ref, shares, **where)
    draft = partial(block_attention, *step.all, block_size=1)
    want = partial(first(block_attention_ref), *step.all, chosen, block_size=1)

    def round_of_drafts() -> Tensor:
        keys = choose()[:, :, None]
        return [draft(keys) for _ in range(stride)][-1]

    def full_steps() -> None:
        for _ in range(stride):
            step.full()

    # Shares are read by two counts and by what takes the best of them.
    shares_moved = nbytes(done.kept, done.tops, shares)
    choice_moved = 3 * nbytes(shares) + nbytes(chosen)
    # Keys and values at chosen places.
    draft_moved = nbytes(chosen) * (1 + 2 * dim * step.k.element_size() // chosen.element_size())
    case: Any = partial(Case, shape=step.shape, limit=1e-2)
    yield case(
        round_of_drafts,
        name=f"SparseSpec, {stride} draft steps over {budget} keys and their choice",
        reference=want,
        moved=shares_moved + choice_moved + stride * draft_moved,
        peers={"as many full steps": Call(full_steps)},
        targets={"as many full steps": 10.0},
        note="the verification, which leaves its weights, is timed below",
    )
    yield case(
        choose,
        name="SparseSpec's choice alone, shares of keys included",
        reference=best,
        moved=shares_moved + choice_moved,
        **EXACT,
    )
    yield case(
        lambda: kernel.verify_attention(q, step.k, step.v).out,
        name=f"SparseSpec, verification of {stride + 1} tokens, which leaves its weights",
        reference=Heads(q, step.k, step.v).prefill,
        moved=nbytes(step.k, step.v, done.kept, done.tops),
        peers={"our full decode": step.full},
    )
