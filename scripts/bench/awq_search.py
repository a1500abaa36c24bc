"""Benchmark AWQ's Gram-space search for one block of Llama-2-7B's shape on the CUDA device.

    python scripts/bench/awq_search.py          # check, then time each input site and a whole block
    python scripts/bench/awq_search.py --tune   # check, then sweep the kernels' tiles
    python scripts/bench/awq_search.py --gram   # errors from Gram matrices alone, by tiles

W4, group 128, asymmetric: 20 candidate scales for each of the four inputs of a block, then 10
clipping bounds for each group of its seven linears. Weights are random in float32, as a pass gets
them; Gram matrices are those of random inputs with a few large channels. Correctness is checked
first, and a failure stops the run. Sites are timed by the wall clock, since a search ends in a
decision on the host; the kernels by CUDA graphs that rotate over more memory than the L2 cache
holds. With OUT set, figures go to OUT/awq_search*.json.
"""

import argparse
import itertools
import statistics
import time
from functools import partial

import torch
from compressor_kernels.search import awq_candidate
from compressor_kernels.search.awq_candidate import (
    candidate_delta,
    candidate_delta_ref,
    clip_bounds,
    clip_bounds_ref,
)
from compressor_kernels.search.gram_error import GramTiles, gram_error_ref
from compressor_kernels.search.gram_error import gram_error as fused_gram_error
from timing import copy_gbps, graph_ms, require, save
from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import quantize
from compressor.numerics.awq_search import search_clip_gram, search_scales_gram
from compressor.numerics.gram import gram_error

HIDDEN, WIDE, BLOCKS, TOKENS = 4096, 11008, 32, 16384
SITES = {
    "q, k, v": [(HIDDEN, HIDDEN)] * 3,
    "o": [(HIDDEN, HIDDEN)],
    "gate, up": [(WIDE, HIDDEN)] * 2,
    "down": [(HIDDEN, WIDE)],
}
SPEC = QuantSpec("int", 4, "group", 128, zero="subtract", scale_dtype=torch.bfloat16)
GRID = {"bits": 4, "symmetric": False, "stored": torch.bfloat16}
GRAM_TILES = [
    GramTiles(),
    GramTiles(num_stages=3),
    GramTiles(block_k=128, num_stages=2),
    GramTiles(256, 128),
    GramTiles(128, 128, num_warps=4, num_stages=3, resident=2),
    GramTiles(128, 128),
    GramTiles(64, 256, 32, num_warps=4, num_stages=5, resident=2),
]


def site(shapes: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights [O, C], Gram matrix [C, C] and mean |x| [C] of one input."""
    columns = shapes[0][1]
    x = torch.randn(TOKENS, columns, device="cuda")
    x *= torch.exp(torch.randn(columns, device="cuda"))
    weights = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    return weights, x.t() @ x, x.abs().mean(0)


def check() -> None:
    weight = torch.randn(512, 1024, device="cuda") * 0.02
    scales = torch.exp(torch.randn(1024, device="cuda"))
    x = torch.randn(8, 512, 128, device="cuda")
    gram = x.mT @ x
    for symmetric in (False, True):
        options = {**GRID, "symmetric": symmetric}
        found = candidate_delta(weight, scales, group_size=128, **options).float()
        want = candidate_delta_ref(weight, scales, group_size=128, **options).float()
        off = ((found - want).abs() > 1e-2 * want.abs() + 1e-6).float().mean().item()
        report("weights whose candidate error differs", off, 1e-3)
        found, want = clip_bounds(weight, gram, **options), clip_bounds_ref(weight, gram, **options)
        differ = (found / want - 1).abs().gt(1e-3).float().mean().item()
        report("groups whose bound differs", differ, 0.05)
        more = clipped_error(weight, gram, found, symmetric)
        more /= clipped_error(weight, gram, want, symmetric)
        report("clipped error over the reference's", more - 1, 1e-3)
    (weight,), gram, absmean = site([(512, 1024)])
    result = search_scales_gram([weight], gram, absmean, SPEC)
    slow = search_scales_gram([weight.cpu()], gram.cpu(), absmean.cpu(), SPEC)
    losses = torch.tensor([result.losses, slow.losses])
    report("losses of candidates, GPU to CPU", float((losses[0] / losses[1] - 1).abs().max()), 1e-2)


def clipped_error(weight: Tensor, gram: Tensor, bounds: Tensor, symmetric: bool) -> float:
    zero = "none" if symmetric else "subtract"
    spec = QuantSpec("int", 4, "group", 128, zero=zero, scale_dtype=torch.bfloat16)
    q = quantize(weight, spec, clip_max=bounds)
    delta = (q.dequantize() - weight).view(weight.shape[0], -1, 128)
    return float(torch.einsum("rgi,gij,rgj->", delta, gram, delta))


def report(what: str, value: float, limit: float) -> None:
    print(f"  {what:<42} {value:.2e} (limit {limit:.0e})", flush=True)
    if not value <= limit:
        raise SystemExit(f"{what}: {value:.3e} is over {limit:.0e}; no timings reported")


def wall_ms(run, repeats: int = 5) -> float:
    """Median milliseconds of the wall clock, the device idle before and after."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def time_sites() -> dict[str, float]:
    results = {}
    print(f"{'site':<10}{'scales ms':>11}{'clip ms':>9}{'products ms':>13}")
    for name, shapes in SITES.items():
        weights, gram, absmean = site(shapes)
        delta = torch.randn(sum(s[0] for s in shapes), shapes[0][1], device="cuda").bfloat16()

        def scales(weights=weights, gram=gram, absmean=absmean):
            return search_scales_gram(weights, gram, absmean, SPEC)

        best = scales().scales

        def clip(weights=weights, gram=gram, best=best):
            return [search_clip_gram(w, gram, SPEC, scales=best) for w in weights]

        def products(delta=delta, gram=gram):
            return [gram_error(delta, gram) for _ in range(21)]

        row = (wall_ms(scales), wall_ms(clip), wall_ms(products))
        results[f"{name} scales"], results[f"{name} clip"], results[f"{name} products"] = row
        print(f"{name:<10}{row[0]:>11.2f}{row[1]:>9.2f}{row[2]:>13.2f}", flush=True)
        del weights, gram, delta, scales, clip, products
    block = sum(ms for name, ms in results.items() if not name.endswith("products"))
    results["block"], results["all blocks s"] = block, block * BLOCKS / 1e3
    print(f"one block {block:.1f} ms; {BLOCKS} blocks {results['all blocks s']:.2f} s")
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    return results


def delta_us(sets: list[tuple[Tensor, Tensor]], scales: Tensor) -> float:
    def run() -> None:
        for weight, out in sets:
            candidate_delta(weight, scales, group_size=128, out=out, **GRID)

    return graph_ms(run) * 1e3 / len(sets)


def clip_us(weights: list[Tensor], gram: Tensor) -> float:
    outs: list[Tensor] = []

    def run() -> None:
        outs[:] = [clip_bounds(w, gram, **GRID) for w in weights]

    return graph_ms(run) * 1e3 / len(weights)


def time_kernels(tune: bool) -> dict[str, float]:
    weights = [torch.randn(WIDE, HIDDEN, device="cuda") * 0.02 for _ in range(2)]
    sets = [(w, torch.empty_like(w, dtype=torch.bfloat16)) for w in weights]
    scales = torch.exp(torch.randn(HIDDEN, device="cuda"))
    x = torch.randn(HIDDEN // 128, 512, 128, device="cuda")
    gram = x.mT @ x
    ceiling = copy_gbps()
    nbytes = weights[0].numel() * 6
    results = {"copy GB/s": ceiling}
    if tune:
        for tile, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (2, 4, 8)):
            awq_candidate.TILE, awq_candidate.WARPS = tile, warps
            results[f"delta tile {tile} warps {warps} us"] = delta_us(sets, scales)
        for rows, warps in itertools.product((16, 32, 64, 128), (4, 8)):
            awq_candidate.CLIP_TILE, awq_candidate.CLIP_WARPS = rows * 128, warps
            results[f"clip rows {rows} warps {warps} us"] = clip_us(weights, gram)
        for kind in ("delta", "clip"):
            ranked = sorted((v, k) for k, v in results.items() if k.startswith(kind))
            print("\n".join(f"{v:9.1f} us  {k}" for v, k in ranked[:4]))
        return results
    took = delta_us(sets, scales)
    results["delta us"], results["delta share of copy"] = took, nbytes / took / 1e3 / ceiling
    results["clip us"] = clip_us(weights, gram)
    flops = 2 * weights[0].numel() * 128 * 10
    print(f"candidate_delta {WIDE}x{HIDDEN}: {took:.1f} us, {nbytes / took / 1e3:.0f} GB/s, "
          f"{results['delta share of copy']:.0%} of copy ({ceiling:.0f} GB/s)")  # fmt: skip
    print(f"clip_bounds     {WIDE}x{HIDDEN}: {results['clip us']:.1f} us, "
          f"{flops / results['clip us'] / 1e6:.0f} TFLOP/s in its products")  # fmt: skip
    return results


def torch_gram_error(delta: Tensor, gram: Tensor, columns: int = 2048) -> Tensor:
    """The same from products that are written out, `columns` rows of the square at a time."""
    total = torch.zeros((), device=delta.device)
    for start in range(0, delta.shape[1], columns):
        stop = min(start + columns, delta.shape[1])
        products = torch.mm(delta[:, start:stop].t(), delta[:, start:], out_dtype=torch.float32)
        products.mul_(gram[start:stop, start:])
        total += products[:, : stop - start].sum() + 2 * products[:, stop - start :].sum()
    return total


def time_gram() -> dict[str, float]:
    """Each shape of a block, by PyTorch and by the kernel in several tiles.

    All values are positive, so that each element of the square counts alike.
    """
    ways = {"PyTorch": torch_gram_error}
    for t in GRAM_TILES:
        name = f"{t.block_m}x{t.block_n}x{t.block_k} w{t.num_warps} s{t.num_stages} x{t.resident}"
        ways[name] = partial(fused_gram_error, tiles=t)
    results = {}
    for rows, columns in ((3 * HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)):
        delta = torch.rand(rows, columns, device="cuda").bfloat16()
        x = torch.rand(columns, columns, device="cuda")
        gram = x.t() @ x
        want = float(gram_error_ref(delta, gram))
        for name, way in ways.items():
            what = f"{rows}x{columns} {name}"
            first = way(delta, gram)
            # Tensor cores cut off what they add in float32: the more rows of one sign, the more.
            require(what, abs(float(first) / want - 1), 5e-4)
            require(f"{what}, once more", float((way(delta, gram) - first).abs()), 0.0)
            results[f"{what} ms"] = ms = graph_ms(partial(way, delta, gram), inner=4)
            speed = rows * columns * (columns + 1) / ms / 1e9
            print(f"{what:<40}{ms:8.3f} ms {speed:6.0f} TFLOP/s of the upper half", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep the kernels' tiles")
    parser.add_argument("--gram", action="store_true", help="errors from Gram matrices alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.gram:
        save("awq_search_gram.json", time_gram())
        return
    check()
    results = time_kernels(args.tune)
    if not args.tune:
        results |= time_sites()
    save("awq_search_tune.json" if args.tune else "awq_search.json", results)


if __name__ == "__main__":
    main()
