"""Benchmark the one-bit delta product of several tenants on the current CUDA device.

    python scripts/bench/bitdelta.py          # check, then time against dense fp16 matrices
    python scripts/bench/bitdelta.py --tune   # check, then sweep tile shapes

16 tenants of one 4096 x 4096 linear. The peer keeps each tenant's matrix in fp16 and runs
`torch.bmm`. Times come from CUDA graphs that rotate over more memory than the L2 cache holds.
Correctness is checked first; a failure stops the run. With OUT set, figures go to
OUT/bitdelta*.json.
"""

import argparse
from functools import partial

import torch
from compressor_kernels.linear.bitdelta import DeltaTiles, _tiles, delta_matmul, delta_matmul_ref
from compressor_kernels.linear.bitdelta_jit import delta_kernel
from sass import issued
from timing import copy_gbps, graph_ms, relative_error, require, save
from torch import Tensor

TENANTS, INNER, OUTER, SETS = 16, 4096, 4096, 4
ROWS = (1, 2, 4, 16)
CANDIDATES = [
    DeltaTiles(block, 2, warps, stages)
    for block, warps, stages in [
        (128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 8, 2), (128, 8, 3), (128, 8, 4),
        (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 2, 2), (64, 2, 3), (64, 2, 4),
        (256, 8, 2), (256, 8, 3), (32, 2, 3), (32, 2, 4),
    ]
]  # fmt: skip
MANY_TOKENS = [
    DeltaTiles(block, tokens, 4, stages)
    for tokens in (4, 8, 16)
    for block in (64, 128)
    for stages in (2, 3)
]


def problem(rows: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    x = torch.randn(TENANTS, rows, INNER, dtype=torch.float16, device="cuda")
    shape = (TENANTS, INNER // 32, OUTER)
    info = torch.iinfo(torch.int32)
    signs = [
        torch.randint(info.min, info.max, shape, dtype=torch.int32, device="cuda")
        for _ in range(SETS)
    ]
    alpha = torch.rand(TENANTS, device="cuda")
    base = torch.randn(TENANTS, rows, OUTER, dtype=torch.float16, device="cuda")
    return x, signs, alpha, base


def check(tiles: DeltaTiles | None = None) -> None:
    for rows in ROWS if tiles is None else (tiles.tokens,):
        x, signs, alpha, base = problem(rows)
        want = delta_matmul_ref(x.float(), signs[0], alpha, base_out=base)
        out = delta_matmul(x, signs[0], alpha, base_out=base, tiles=tiles)
        require(f"{rows} tokens, {tiles or 'default tiles'}", relative_error(out, want), 1e-3)


def delta_us(rows: int, tiles: DeltaTiles | None = None) -> float:
    x, signs, alpha, base = problem(rows)
    outs: list[Tensor] = []

    def run() -> None:
        outs[:] = [delta_matmul(x, s, alpha, base_out=base, tiles=tiles) for s in signs]

    return graph_ms(run) * 1e3 / SETS


def dense_us(rows: int) -> float:
    x = torch.randn(TENANTS, rows, INNER, dtype=torch.float16, device="cuda")
    weights = torch.randn(2, TENANTS, INNER, OUTER, dtype=torch.float16, device="cuda")
    outs: list[Tensor] = []

    def run() -> None:
        outs[:] = [torch.bmm(x, w) for w in weights]

    # Weights lie [out, in] in a checkpoint; bmm is given whichever order it is faster with.
    plain = graph_ms(run)
    weights = weights.mT
    return min(plain, graph_ms(run)) * 1e3 / 2


def bench() -> dict[str, object]:
    ceiling = copy_gbps()
    print(f"device copy {ceiling:,.0f} GB/s")
    print(
        f"{'tokens':>6} {'dense fp16':>12} {'one bit':>10} {'ratio':>7} {'GB/s':>7} {'of copy':>8}"
    )
    results: dict[str, object] = {"copy_gbps": ceiling}
    for rows in ROWS:
        dense, ours = dense_us(rows), delta_us(rows)
        moved = TENANTS * (INNER * OUTER / 8 + 2 * rows * (INNER + 2 * OUTER))
        rate = moved / ours / 1e3
        print(
            f"{rows:>6} {dense:>9.1f} us {ours:>7.1f} us {dense / ours:>6.2f}x {rate:>7,.0f}"
            f" {rate / ceiling:>7.0%}"
        )
        results[f"rows_{rows}"] = {"dense_us": dense, "delta_us": ours, "gbps": rate}
        # A program takes 1,024 inputs of its outputs a step.
        signs = 1024 * _tiles(TENANTS, rows, OUTER).block_n
        x, packed, alpha, base = problem(rows)
        run = partial(delta_matmul, x, packed[0], alpha, base_out=base)
        counted = issued(delta_kernel, run, items=signs)
        print(f"       {moved / (TENANTS * INNER * OUTER):.4f} bytes a sign; {counted}")
        results[f"rows_{rows} instructions per sign"] = counted
    return results


def tune() -> dict[str, float]:
    results = {}
    for rows, candidates in ((1, CANDIDATES), (16, MANY_TOKENS)):
        times = {}
        for tiles in candidates:
            check(tiles)
            times[str(tiles)] = delta_us(rows, tiles)
        for name, us in sorted(times.items(), key=lambda item: item[1])[:6]:
            print(f"{rows:>3} tokens {us:7.1f} us  {name}")
            results[f"{rows} tokens {name}"] = us
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep tile shapes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    if arguments.tune:
        save("bitdelta_tune.json", tune())
        return
    check()
    save("bitdelta.json", bench())


if __name__ == "__main__":
    main()
