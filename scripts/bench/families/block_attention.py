"""Choosing blocks of keys and attending to them: 64k tokens, 32 query heads over 8 KV heads of 128,
96 of 1,024 blocks of 64 keys. Forecasts are random."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from case import Case, Peer, Setup, different, first_rows, nbytes, relative_error
from compressor_kernels.attention import block_attention as attention
from compressor_kernels.attention import block_windows as windows
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import WindowRule
from compressor_kernels.attention.head_attention import full_decode, full_decode_ref, head_prefill
from torch import Tensor

TILES = [attention.BlockTiles(64, w, s, per_sm) for w, s in ((2, 3), (4, 3)) for per_sm in (4, 8)]


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    batch: int
    heads: int
    groups: int
    dim: int
    tokens: int
    rule: BlockRule
    windows: WindowRule
    pages: BlockRule


FULL = Shape(
    8, 32, 8, 128, 65536, BlockRule(block_size=64, init_blocks=1, local_blocks=32, top_k=96),
    WindowRule(kernel_size=32, stride=16),
    BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=128),
)  # fmt: skip
TINY = Shape(
    2, 4, 2, 16, 200, BlockRule(block_size=16, init_blocks=1, local_blocks=1, top_k=5),
    WindowRule(kernel_size=8, stride=4),
    BlockRule(block_size=4, init_blocks=0, local_blocks=0, top_k=6),
)  # fmt: skip


def cases(setup: Setup) -> Iterator[Case]:
    shape = setup.pick(FULL, TINY)
    yield from decode(setup, shape)
    yield from prefill(setup, shape)


def decode(setup: Setup, shape: Shape) -> Iterator[Case]:
    batch, groups, tokens, rule = shape.batch, shape.groups, shape.tokens, shape.rule
    q = setup.randn(batch, shape.heads, 1, shape.dim)
    forecast = setup.randn(batch, groups, 1, shape.dim)
    k, v = (setup.randn(batch, groups, tokens, shape.dim) for _ in range(2))
    compressed = windows.compress_keys(k, shape.windows)
    low, high = page_bounds(k, page_size=shape.pages.block_size)
    full = Peer(lambda i: full_decode(q, k, v))
    scored = (forecast, compressed, rule, shape.windows)
    scores = windows.forecast_scores(*scored, tokens=tokens)
    blocks = top_blocks(scores, rule, tokens=tokens)

    def attend(blocks: Tensor, rule: BlockRule = rule, tiles: Any = None) -> Tensor:
        return attention.block_attention(q, k, v, blocks, block_size=rule.block_size, tiles=tiles)

    def exact(blocks: Tensor, rule: BlockRule = rule) -> Tensor:
        """Of the first row, by the reference."""
        first = (q[:1], k[:1], v[:1], blocks[:1])
        return attention.block_attention_ref(*first, block_size=rule.block_size)

    def chosen(found: Callable[[], Tensor], rule: BlockRule = rule) -> dict[str, Any]:
        """Selection and attention, held against attention to what a plain selection chooses."""
        return {
            "run": lambda i: attend(top_blocks(found(), rule, tokens=tokens), rule),
            "want": lambda: exact(top_blocks_ref(found(), rule, tokens=tokens), rule),
        }

    def by_pages(group_max: bool) -> Tensor:
        return page_scores(q, low, high, group_max=group_max)

    def by_attention() -> Tensor:
        return windows.attention_scores(q, compressed, rule, shape.windows, tokens=tokens)

    def by_forecast() -> Tensor:
        return windows.forecast_scores(*scored, tokens=tokens)

    ways: dict[str, dict[str, Any]] = {
        "full attention": {"run": full.run, "want": lambda: full_decode_ref(q[:1], k[:1], v[:1]),
                           "moved": nbytes(k, v), "targets": {"copy": 0.75}},
        "forecast: selection and attention": {
            **chosen(by_forecast), "targets": {"full attention": 5.0}},
        "forecast: scores": {"run": lambda i: by_forecast(), "error": finite_error,
                             "want": lambda: windows.forecast_scores_ref(*scored, tokens=tokens)},
        "forecast: top-k": {"run": lambda i: top_blocks(scores, rule, tokens=tokens),
                            "want": lambda: top_blocks_ref(scores, rule, tokens=tokens),
                            "error": lambda out, want: different([out], [want]), "limit": 0.0},
        "forecast: attention": {
            "run": lambda i, tiles=None: attend(blocks, tiles=tiles), "tiles": TILES,
            "want": lambda: exact(blocks)},
        "InfLLM-V2: selection and attention": chosen(by_attention),
        "Quest by query head": chosen(partial(by_pages, False), shape.pages),
        "Quest by KV head": chosen(partial(by_pages, True), shape.pages),
    }  # fmt: skip
    for name, way in ways.items():
        peers = {} if name == "full attention" else {"full attention": full}
        what = f"{batch}x{shape.heads}/{groups}x{tokens}"
        yield Case(
            f"decode, {name}",
            shape=what,
            peers=peers,
            **{"limit": 6e-3, "error": first_rows, **way},
        )


def finite_error(out: Tensor, want: Tensor) -> float:
    """Of scores, where blocks that are not yet past have none."""
    past = torch.isfinite(want)
    return relative_error(out[past], want[past])


def prefill(setup: Setup, shape: Shape) -> Iterator[Case]:
    """The last piece of a prompt, which sees the most keys; what its tokens forecast is as alike
    from one to the next as the correlation says (0: not at all, the hardest case)."""
    rule, tokens, groups = shape.rule, shape.tokens, shape.groups
    queries = min(4096, tokens // 2)
    q = setup.randn(1, shape.heads, queries, shape.dim)
    k, v = (setup.randn(1, groups, tokens, shape.dim) for _ in range(2))
    compressed = windows.compress_keys(k, shape.windows)
    none = torch.zeros(groups, dtype=torch.bool, device=setup.device)
    full = Peer(lambda i: head_prefill(q, k, v, streaming=none, sink=0, window=1))
    for alike in (0.0, 0.9, 0.99):
        forecast = alike_forecasts(setup, (1, groups, queries, shape.dim), alike)

        def choose(i: int = 0, forecast: Tensor = forecast) -> Tensor:
            found = windows.forecast_scores(
                forecast, compressed, rule, shape.windows, tokens=tokens
            )
            return top_blocks(found, rule, tokens=tokens)

        blocks = choose()
        what = f"1x{shape.heads}/{groups}x{queries} of {tokens}"
        yield Case(
            f"prefill, choosing, correlation {alike}",
            choose,
            choose,
            shape=what,
            peers={"full": full},
        )
        for rows in (64, 128):
            tile = rows * groups // shape.heads
            read = attention.tile_blocks(blocks, tile=tile, count=rule.blocks(tokens))[2]
            tiles = attention.BlockTiles(rows=rows)
            yield Case(
                f"prefill, chosen blocks, correlation {alike}, tiles of {rows} rows",
                
                lambda i, blocks=blocks, tiles=tiles: attention.block_attention(
                    q, k, v, blocks, block_size=rule.block_size, tiles=tiles
                ),
                partial(
                    attention.block_attention_ref, q[:, :, -2:], k, v, blocks[:, :, -2:],
                    block_size=rule.block_size,
                ), shape=what,
                limit=6e-3,
                error=lambda out, want: relative_error(out[:, :, -2:], want),
                peers={"full": full},
                note=lambda read=read: f"{read.float().mean():.0f} blocks a tile",
            )  # fmt: skip


def alike_forecasts(setup: Setup, shape: tuple[int, ...], alike: float) -> Tensor:
    """Forecasts [1, G, queries, D] of which neighbours correlate by `alike`."""
    out = setup.randn(*shape)
    for token in range(1, shape[2] if alike else 0):
        fresh = out[:, :, token] * (1 - alike**2) ** 0.5
        out[:, :, token] = alike * out[:, :, token - 1] + fresh
    return out
