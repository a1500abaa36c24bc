"""Choosing blocks of keys and attending to them: 64k tokens, 32 query heads over 8 KV heads of 128,
96 of 1,024 blocks of 64 keys. Forecasts are random."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from case import Case, Peer, Setup, different, first_rows, last_queries, nbytes, relative_error
from compressor_kernels.attention import block_windows as windows
from compressor_kernels.attention.block_attention import (
    BlockTiles,
    block_attention,
    block_attention_ref,
    tile_blocks,
)
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import WindowRule
from compressor_kernels.attention.head_attention import full_decode_ref, head_prefill
from torch import Tensor

FULL = (
    (8, 32, 8, 65536, 128),
    BlockRule(block_size=64, init_blocks=1, local_blocks=32, top_k=96),
    WindowRule(kernel_size=32, stride=16),
    BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=128),
)
TINY = (
    (2, 4, 2, 200, 16),
    BlockRule(block_size=16, init_blocks=1, local_blocks=1, top_k=5),
    WindowRule(kernel_size=8, stride=4),
    BlockRule(block_size=4, init_blocks=0, local_blocks=0, top_k=6),
)


def cases(setup: Setup) -> Iterator[Case]:
    sides, rule, window, pages = setup.pick(FULL, TINY)
    yield from decode(setup, sides, rule, window, pages)
    yield from prefill(setup, sides, rule, window)


def decode(
    setup: Setup,
    sides: tuple[int, int, int, int, int],
    rule: BlockRule,
    window: WindowRule,
    pages: BlockRule,
) -> Iterator[Case]:
    step, tokens = setup.heads(*sides), sides[3]
    forecast = setup.randn(sides[0], sides[2], 1, sides[4])
    compressed = windows.compress_keys(step.k, window)
    low, high = page_bounds(step.k, page_size=pages.block_size)
    scored = (forecast, compressed, rule, window)

    def by_forecast() -> Tensor:
        return windows.forecast_scores(*scored, tokens=tokens)

    def by_attention() -> Tensor:
        return windows.attention_scores(step.q, compressed, rule, window, tokens=tokens)

    def by_pages(group_max: bool) -> Tensor:
        return page_scores(step.q, low, high, group_max=group_max)

    def attend(blocks: Tensor, rule: BlockRule = rule) -> Tensor:
        return block_attention(step.q, step.k, step.v, blocks, block_size=rule.block_size)

    def exact(blocks: Tensor, rule: BlockRule = rule) -> Tensor:
        """Of the first row, by the reference."""
        return block_attention_ref(*step.first, blocks[:1], block_size=rule.block_size)

    def chosen(found: Callable[[], Tensor], rule: BlockRule = rule) -> dict[str, Any]:
        """Selection and attention, held against attention to what a plain selection chooses."""
        return {
            "run": lambda i: attend(top_blocks(found(), rule, tokens=tokens), rule),
            "want": lambda: exact(top_blocks_ref(found(), rule, tokens=tokens), rule),
        }

    scores = by_forecast()
    blocks = top_blocks(scores, rule, tokens=tokens)
    case = partial(Case, shape=step.shape, limit=6e-3, error=first_rows)
    yield case(
        "decode, full attention",
        step.full.run,
        lambda: full_decode_ref(*step.first),
        moved=nbytes(step.k, step.v),
        targets={"copy": 0.75},
    )
    ways: dict[str, dict[str, Any]] = {
        "forecast: selection and attention": {
            **chosen(by_forecast),
            "targets": {"full attention": 5.0},
        },
        "forecast: scores": {
            "run": lambda i: by_forecast(),
            "want": lambda: windows.forecast_scores_ref(*scored, tokens=tokens),
            "error": finite_error,
        },
        "forecast: top-k": {
            "run": lambda i: top_blocks(scores, rule, tokens=tokens),
            "want": lambda: top_blocks_ref(scores, rule, tokens=tokens),
            "error": different,
            "limit": 0.0,
        },
        "forecast: attention": {"run": lambda i: attend(blocks), "want": lambda: exact(blocks)},
        "InfLLM-V2: selection and attention": chosen(by_attention),
        "Quest by query head": chosen(partial(by_pages, False), pages),
        "Quest by KV head": chosen(partial(by_pages, True), pages),
    }
    for name, way in ways.items():
        yield case(f"decode, {name}", **way, peers={"full attention": step.full})


def finite_error(out: Tensor, want: Tensor) -> float:
    """Of scores, where blocks that are not yet past have none."""
    past = torch.isfinite(want)
    return relative_error(out[past], want[past])


def prefill(
    setup: Setup, sides: tuple[int, int, int, int, int], rule: BlockRule, window: WindowRule
) -> Iterator[Case]:
    """The last piece of a prompt, which sees the most keys; what its tokens forecast is as alike
    from one to the next as the correlation says (0: not at all, the hardest case)."""
    _, heads, groups, tokens, dim = sides
    queries = min(4096, tokens // 2)
    piece = setup.heads(1, heads, groups, tokens, dim, queries=queries)
    q, k, v = piece.q, piece.k, piece.v
    compressed = windows.compress_keys(k, window)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    full = Peer(lambda i: head_prefill(q, k, v, streaming=none, sink=0, window=1))
    case = partial(Case, shape=f"{piece.shape}, {queries} queries", peers={"full": full})
    size = {"block_size": rule.block_size}
    for alike in (0.0, 0.9, 0.99):
        forecast = alike_forecasts(setup, (1, groups, queries, dim), alike)

        def choose(i: int = 0, forecast: Tensor = forecast) -> Tensor:
            found = windows.forecast_scores(forecast, compressed, rule, window, tokens=tokens)
            return top_blocks(found, rule, tokens=tokens)

        blocks = choose()
        yield case(f"prefill, choosing, correlation {alike}", choose, choose)
        for rows in (64, 128):
            tiles = BlockTiles(rows=rows)
            read = tile_blocks(
                blocks, tile=rows * groups // heads, count=rule.blocks(tokens)
            )[2].float().mean()  # fmt: skip
            yield case(
                f"prefill, chosen blocks, correlation {alike}, tiles of {rows} rows",
                lambda i, b=blocks, t=tiles: block_attention(q, k, v, b, **size, tiles=t),
                partial(block_attention_ref, q[:, :, -2:], k, v, blocks[:, :, -2:], **size),
                limit=6e-3,
                error=last_queries,
                note=lambda read=read: f"{read:.0f} blocks a tile",
            )


def alike_forecasts(setup: Setup, shape: tuple[int, ...], alike: float) -> Tensor:
    """Forecasts [1, G, queries, D] of which neighbours correlate by `alike`."""
    out = setup.randn(*shape)
    for token in range(1, shape[2] if alike else 0):
        fresh = out[:, :, token] * (1 - alike**2) ** 0.5
        out[:, :, token] = alike * out[:, :, token - 1] + fresh
    return out
