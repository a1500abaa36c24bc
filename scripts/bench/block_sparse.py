"""Benchmark block selection with block-sparse attention, and the lookahead, on a CUDA device.

    python scripts/bench/block_sparse.py            # check, then time
    python scripts/bench/block_sparse.py --tune     # sweep tile shapes too
    TRITON_INTERPRET=1 python scripts/bench/block_sparse.py --dry   # tiny, on a CPU, no times

64k tokens, 32 query heads over 8 KV heads of 128, batch 8, bf16, 96 of 1,024 blocks of 64 keys.
Correctness is checked first; a failure stops the run. Forecasts are random and drift from step to
step, so the hit rates follow from --drift; they say nothing about a model.
With the environment variable OUT set, all figures go to OUT/block_sparse.json.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compressor_kernels.attention.block_attention import (
    BlockTiles,
    block_attention,
    block_attention_ref,
    tile_blocks,
)
from compressor_kernels.attention.block_pages import page_bounds, page_scores
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import (
    WindowRule,
    attention_scores,
    compress_keys,
    forecast_scores,
    forecast_scores_ref,
)
from compressor_kernels.attention.head_attention import full_decode, full_decode_ref, head_prefill
from lookahead import lookahead
from timing import copy_gbps, graph_ms, relative_error, require, save
from torch import Tensor

PUBLISHED = BlockRule(block_size=64, init_blocks=1, local_blocks=32, top_k=96)
WINDOWS = WindowRule(kernel_size=32, stride=16)
PAGES = BlockRule(block_size=16, init_blocks=0, local_blocks=0, top_k=128)
CANDIDATES = [
    BlockTiles(block, warps, stages, per_sm)
    for (block, warps, stages), per_sm in itertools.product(
        [(32, 2, 4), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3)], [2, 4, 8]
    )
]


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    batch: int = 8
    heads: int = 32
    groups: int = 8
    dim: int = 128
    tokens: int = 65536
    rule: BlockRule = PUBLISHED
    windows: WindowRule = WINDOWS
    pages: BlockRule = PAGES
    device: str = "cuda"

    def randn(self, *shape: int) -> Tensor:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float16
        return torch.randn(*shape, device=self.device).to(dtype)


TINY = Shape(
    batch=1,
    heads=4,
    groups=2,
    dim=16,
    tokens=200,
    rule=BlockRule(block_size=16, init_blocks=1, local_blocks=1, top_k=5),
    windows=WindowRule(kernel_size=8, stride=4),
    pages=BlockRule(block_size=4, init_blocks=0, local_blocks=0, top_k=6),
    device="cpu",
)


def check(shape: Shape, candidates: list[BlockTiles]) -> None:
    """Selection and attention against plain references, some lengths odd."""
    print("Correctness, relative error against fp32:")
    rule, odd = shape.rule, min(shape.tokens, 20011)
    q = shape.randn(2, shape.heads, 1, shape.dim)
    k, v = (shape.randn(2, shape.groups, odd, shape.dim) for _ in range(2))
    forecast = shape.randn(2, shape.groups, 1, shape.dim)
    compressed = compress_keys(k, shape.windows)
    lengths = torch.tensor([odd, odd - odd // 3], dtype=torch.int32, device=shape.device)
    where = {"tokens": odd, "lengths": lengths}
    scores = forecast_scores(forecast, compressed, rule, shape.windows, **where)
    want = forecast_scores_ref(forecast, compressed, rule, shape.windows, **where)
    past = torch.isfinite(want)
    require("forecast scores", relative_error(scores[past], want[past]), 6e-3)
    blocks = top_blocks(scores, rule, **where)
    same = torch.equal(blocks, top_blocks_ref(scores, rule, **where))
    require("top blocks", 0.0 if same else float("inf"), 1e-9)
    for tiles in candidates:
        out = block_attention(
            q, k, v, blocks, block_size=rule.block_size, lengths=lengths, tiles=tiles
        )
        exact = block_attention_ref(q, k, v, blocks, block_size=rule.block_size, lengths=lengths)
        require(f"attention {short(tiles)}", relative_error(out, exact), 6e-3)


def short(tiles: BlockTiles) -> str:
    return str(tiles).replace("num_", "").replace("block_", "")


def decode_parts(shape: Shape) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """What a decoding step may do, name → work; and the full cache."""
    rule, windows, tokens = shape.rule, shape.windows, shape.tokens
    q = shape.randn(shape.batch, shape.heads, 1, shape.dim)
    forecast = shape.randn(shape.batch, shape.groups, 1, shape.dim)
    k, v = (shape.randn(shape.batch, shape.groups, tokens, shape.dim) for _ in range(2))
    compressed = compress_keys(k, windows)
    low, high = page_bounds(k, page_size=shape.pages.block_size)
    scores = forecast_scores(forecast, compressed, rule, windows, tokens=tokens)
    blocks = top_blocks(scores, rule, tokens=tokens)

    def attend(blocks: Tensor, rule: BlockRule) -> Tensor:
        return block_attention(q, k, v, blocks, block_size=rule.block_size)

    def by_forecast() -> Tensor:
        found = forecast_scores(forecast, compressed, rule, windows, tokens=tokens)
        return attend(top_blocks(found, rule, tokens=tokens), rule)

    def by_attention() -> Tensor:
        found = attention_scores(q, compressed, rule, windows, tokens=tokens)
        return attend(top_blocks(found, rule, tokens=tokens), rule)

    def by_pages(*, group_max: bool) -> Tensor:
        found = page_scores(q, low, high, group_max=group_max)
        return attend(top_blocks(found, shape.pages, tokens=tokens), shape.pages)

    parts = {
        "full attention": lambda: full_decode(q, k, v),
        "forecast: selection and attention": by_forecast,
        "  scores alone": lambda: forecast_scores(
            forecast, compressed, rule, windows, tokens=tokens
        ),
        "  top-k alone": lambda: top_blocks(scores, rule, tokens=tokens),
        "  attention alone": lambda: attend(blocks, rule),
        "InfLLM-V2: selection and attention": by_attention,
        "Quest by head: selection and attention": lambda: by_pages(group_max=False),
        "Quest by KV head: selection and attention": lambda: by_pages(group_max=True),
        "compressing all keys (once)": lambda: compress_keys(k, windows),
    }
    return parts, [q, k, v]


def bench_decode(shape: Shape, results: dict[str, float]) -> None:
    parts, (q, k, v) = decode_parts(shape)
    out, want = parts["full attention"](), full_decode_ref(q[:1], k[:1], v[:1])
    require("full decode, first row", relative_error(out[:1], want), 6e-3)
    rule = shape.rule
    print(
        f"\nDecode, batch {shape.batch}, {shape.tokens} tokens, {shape.heads}/{shape.groups} heads "
        f"of {shape.dim}, {rule.top_k} of {rule.blocks(shape.tokens)} blocks of {rule.block_size}"
    )
    if shape.device != "cuda":
        for name, run in parts.items():
            require(name.strip(), 0.0 if bool(torch.isfinite(run()).any()) else 1.0, 1e-9)
        return
    ceiling = copy_gbps()
    times = {name: graph_ms(run, inner=8) for name, run in parts.items()}
    full = times["full attention"]
    rate = (k.numel() + v.numel()) * k.element_size() / full / 1e6
    print(
        f"  copy ceiling {ceiling:.0f} GB/s; full attention reads {rate:.0f} GB/s of KV, "
        f"{rate / ceiling:.0%} of it (wanted: 75%)"
    )
    for name, ms in times.items():
        print(f"  {name:<44} {ms * 1e3:8.1f} us  {full / ms:6.2f}x full")
    print(f"  forecast {full / times['forecast: selection and attention']:.2f}x (wanted: 5x)")
    results |= {f"decode {name.strip()} ms": ms for name, ms in times.items()}
    results |= {"copy GB/s": ceiling, "full decode GB/s": rate}


def bench_prefill(shape: Shape, results: dict[str, float], *, queries: int = 4096) -> None:
    """The last piece of a prompt, which sees the most keys; what its tokens forecast is as alike
    from one to the next as the correlation says (0: not at all, the hardest case)."""
    rule, windows, tokens = shape.rule, shape.windows, shape.tokens
    queries = min(queries, tokens // 2)
    q = shape.randn(1, shape.heads, queries, shape.dim)
    k, v = (shape.randn(1, shape.groups, tokens, shape.dim) for _ in range(2))
    compressed = compress_keys(k, windows)
    none = torch.zeros(shape.groups, dtype=torch.bool, device=shape.device)
    parts = {"full": lambda: head_prefill(q, k, v, streaming=none, sink=0, window=1)}
    for alike in (0.0, 0.9, 0.99):
        forecast = walk(shape, queries, alike)
        scores = forecast_scores(forecast, compressed, rule, windows, tokens=tokens)
        blocks = top_blocks(scores, rule, tokens=tokens)
        out = block_attention(q, k, v, blocks, block_size=rule.block_size)
        want = block_attention_ref(
            q[:, :, -2:], k, v, blocks[:, :, -2:], block_size=rule.block_size
        )
        name = f"prefill, correlation {alike}, last two queries"
        require(name, relative_error(out[:, :, -2:], want), 6e-3)

        def choose(forecast: Tensor = forecast) -> Tensor:
            found = forecast_scores(forecast, compressed, rule, windows, tokens=tokens)
            return top_blocks(found, rule, tokens=tokens)

        parts[f"selection, correlation {alike}"] = choose
        for rows in (64, 128):
            tiles = BlockTiles(rows=rows)

            def attend(blocks: Tensor = blocks, tiles: BlockTiles = tiles) -> Tensor:
                return block_attention(q, k, v, blocks, block_size=rule.block_size, tiles=tiles)

            require(f"tiles of {rows} rows", relative_error(attend(), out), 6e-3)
            shared = tile_blocks(
                blocks, tile=rows * shape.groups // shape.heads, count=rule.blocks(tokens)
            )[2]
            name = f"attention, correlation {alike}, tiles of {rows} rows"
            print(f"  {name}: {shared.float().mean():.0f} blocks a tile")
            results[f"prefill {name} blocks"] = float(shared.float().mean())
            parts[name] = attend
    if shape.device != "cuda":
        return
    print(f"\nPrefill, the last {queries} of {tokens} tokens, batch 1")
    for name, run in parts.items():
        results[f"prefill {name} ms"] = ms = graph_ms(run, repeats=5)
        print(f"  {name:<44} {ms:8.3f} ms  {results['prefill full ms'] / ms:6.2f}x full")


def walk(shape: Shape, queries: int, alike: float) -> Tensor:
    """Forecasts [1, G, queries, D] of which neighbours correlate by `alike`."""
    out = shape.randn(1, shape.groups, queries, shape.dim)
    for token in range(1, queries if alike else 0):
        fresh = out[:, :, token] * (1 - alike**2) ** 0.5
        out[:, :, token] = alike * out[:, :, token - 1] + fresh
    return out


def tune(shape: Shape, results: dict[str, float]) -> None:
    parts, (q, k, v) = decode_parts(shape)
    del parts
    scores = torch.randn(
        shape.batch, shape.groups, 1, shape.rule.blocks(shape.tokens), device=shape.device
    )
    blocks = top_blocks(scores, shape.rule, tokens=shape.tokens)
    times = {
        short(t): graph_ms(
            lambda t=t: block_attention(q, k, v, blocks, block_size=64, tiles=t), inner=8
        )
        for t in CANDIDATES
    }
    print("\nBest tiles of attention over chosen blocks:")
    for name in sorted(times, key=times.__getitem__)[:8]:
        print(f"  {times[name] * 1e3:8.1f} us  {name}")
    results |= {f"tiles {name} ms": ms for name, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep tile shapes")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, no times")
    parser.add_argument("--layers", type=int, default=4, help="layers of the lookahead")
    parser.add_argument(
        "--drift",
        type=float,
        nargs="+",
        default=[0.9, 0.99, 0.999],
        help="correlation of forecasts between two steps",
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = TINY if arguments.dry else Shape()
    if not arguments.dry:
        print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    results: dict[str, float] = {}
    with torch.inference_mode():
        check(shape, CANDIDATES if arguments.tune else [BlockTiles()])
        bench_decode(shape, results)
        save("block_sparse.json", results)
        if arguments.tune:
            tune(shape, results)
        bench_prefill(shape, results)
        if not arguments.dry:
            torch.cuda.empty_cache()
        lookahead(shape, results, layers=arguments.layers, drifts=arguments.drift)
    save("block_sparse.json", results)


if __name__ == "__main__":
    main()
