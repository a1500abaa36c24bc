"""Choosing blocks of keys and attending to them: 64k tokens, 32 query heads over 8 KV heads of 128,
96 of 1,024 blocks of 64 keys. Forecasts are random."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from case import EXACT, Case, Setup, first
from compressor_kernels.attention import block_windows as windows
from compressor_kernels.attention.block_attention import block_attention, block_attention_ref
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import WindowRule
from compressor_kernels.attention.head_attention import full_decode, full_decode_ref
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
    yield from decode(setup)
    yield from prefill(setup)


def decode(setup: Setup) -> Iterator[Case]:
    sides, rule, window, pages = setup.pick(FULL, TINY)
    batch, _, groups, tokens, dim = sides
    step = setup.heads(*sides)
    compressed = windows.compress_keys(step.k, window)
    low, high = page_bounds(step.k, page_size=pages.block_size)
    forecast = (setup.randn(batch, groups, 1, dim), compressed, rule, window)
    by_forecast = partial(windows.forecast_scores, *forecast, tokens=tokens)
    looked = (step.q, compressed, rule, window)
    by_attention = partial(windows.attention_scores, *looked, tokens=tokens)
    by_pages = partial(page_scores, step.q, low, high)

    def chosen(
        attend: Callable[..., Tensor],
        top: Callable[..., Tensor],
        scores: Callable[[], Tensor],
        rule: BlockRule,
    ) -> Tensor:
        return attend(*step.all, top(scores(), rule, tokens=tokens), block_size=rule.block_size)

    case = partial(Case, shape=step.shape, limit=6e-3)
    yield case(
        full_decode,
        [step.all],
        name="decode, full attention",
        reference=first(full_decode_ref),
        targets={"copy": 0.75},
    )
    case = partial(case, peers={"full attention": step.full})
    ways: dict[str, tuple[Callable[[], Tensor], BlockRule, dict[str, float]]] = {
        "forecast": (by_forecast, rule, {"full attention": 5.0}),
        "InfLLM-V2": (by_attention, rule, {}),
        "Quest by query head": (partial(by_pages, group_max=False), pages, {}),
        "Quest by KV head": (partial(by_pages, group_max=True), pages, {}),
    }
    for name, (scores, by, targets) in ways.items():
        how = {"scores": scores, "rule": by}
        yield case(
            partial(chosen, block_attention, top_blocks),
            how=how,
            name=f"decode, {name}: selection and attention",
            reference=partial(chosen, first(block_attention_ref), top_blocks_ref),
            targets=targets,
        )
    how = {"tokens": tokens}
    yield case(
        windows.forecast_scores,
        [forecast],
        how,
        name="decode, forecast: scores",
        reference=windows.forecast_scores_ref,
    )
    top: dict[str, Any] = {"name": "decode, forecast: top-k", "reference": top_blocks_ref}
    yield case(top_blocks, [(by_forecast(), rule)], how, **top, **EXACT)
    yield case(
        block_attention,
        [(*step.all, top_blocks(by_forecast(), rule, tokens=tokens))],
        {"block_size": rule.block_size},
        name="decode, forecast: attention",
        reference=first(block_attention_ref),
        moved=0,  # it reads the blocks that are chosen alone
    )


def prefill(setup: Setup) -> Iterator[Case]:
    """The last piece of a prompt, which sees the most keys; what its tokens forecast is not alike
    from one to the next, the hardest case."""
    (_, heads, groups, tokens, dim), rule, window, _ = setup.pick(FULL, TINY)
    queries = min(4096, tokens // 2)
    piece = setup.heads(1, heads, groups, tokens, dim, queries=queries)
    compressed = windows.compress_keys(piece.k, window)
    forecast = setup.randn(1, groups, queries, dim)
    scores = windows.forecast_scores(forecast, compressed, rule, window, tokens=tokens)
    yield Case(
        block_attention,
        [(*piece.all, top_blocks(scores, rule, tokens=tokens))],
        {"block_size": rule.block_size},
        name="prefill, chosen blocks",
        reference=lambda q, k, v, blocks, **how: block_attention_ref(
            q[:, :, -2:], k, v, blocks[:, :, -2:], **how
        ),
        shape=f"{piece.shape}, {queries} queries",
        limit=6e-3,
        moved=0,
        peers={"full": piece.prefill},
    )
