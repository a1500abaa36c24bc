"""Time GPTQ on the four inputs of a block of Llama-2-7B's shape, and say what it gains.

    python scripts/bench/gptq.py [--hidden 4096 --wide 11008 --tokens 16384] [--spec int4 ...]

For each input: seconds of the factorization and of the rounding (wall clock, the second of two
runs), the output error of rounding to nearest and of GPTQ, and rows that kept the nearest codes.
Weights and inputs are random, with a few large and many dependent channels. A table is printed;
with OUT set, figures go to OUT/gptq.json. Runs on a CPU too (give small sizes).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import save

from compressor.ir.qtensor import NVFP4, QuantSpec
from compressor.numerics import quantize
from compressor.numerics.gptq import gptq, inverse_factor

SPECS = {
    "int4": QuantSpec("int", 4, "group", 128, scale_dtype=torch.bfloat16),
    "int4 zero": QuantSpec("int", 4, "group", 128, zero="subtract", scale_dtype=torch.bfloat16),
    "int3": QuantSpec("int", 3, "group", 128, zero="subtract", scale_dtype=torch.bfloat16),
    "int8": QuantSpec("int", 8, "channel", scale_dtype=torch.bfloat16),
    "nvfp4": NVFP4,
    "qoq": QuantSpec(
        "int", 4, "group", 128, zero="offset", scale_dtype=torch.int8, second="channel"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=32, help="of the whole model, for the total")
    parser.add_argument("--spec", nargs="*", choices=list(SPECS), default=["int4"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    hidden, wide = options.hidden, options.wide
    sites = {
        "q, k, v": [(hidden, hidden)] * 3,
        "o": [(hidden, hidden)],
        "gate, up": [(wide, hidden)] * 2,
        "down": [(hidden, wide)],
    }
    results = []
    for name in options.spec:
        total = 0.0
        for site, shapes in sites.items():
            row = measure(SPECS[name], shapes, tokens=options.tokens, device=options.device)
            total += row["factor_s"] + row["round_s"]
            results.append({"spec": name, "site": site, **row})
            print(
                f"{name:<10} {site:<10} factor {row['factor_s']:7.3f} s  round "
                f"{row['round_s']:7.3f} s  error {row['nearest']:.3e} -> {row['error']:.3e}  "
                f"kept {row['kept']}/{row['rows']}",
                flush=True,
            )
        whole = total * options.blocks
        print(f"{name:<10} a block {total:.2f} s, {options.blocks} blocks {whole:.0f} s")
        results.append({"spec": name, "site": "block", "seconds": total, "model_seconds": whole})
    save("gptq.json", results)


def measure(
    spec: QuantSpec, shapes: list[tuple[int, int]], *, tokens: int, device: str
) -> dict[str, Any]:
    """One input site: the times of its two steps and what they give."""
    generator = torch.Generator(device).manual_seed(0)
    columns = shapes[0][1]
    gram = torch.zeros(columns, columns, device=device)
    mix = torch.randn(columns // 8, columns, generator=generator, device=device)
    large = torch.exp(torch.randn(columns, generator=generator, device=device))
    for start in range(0, tokens, 4096):
        rows = min(4096, tokens - start)
        shared = torch.randn(rows, columns // 8, generator=generator, device=device) @ mix
        own = torch.randn(rows, columns, generator=generator, device=device)
        x = (0.1 * shared + own) * large
        gram += x.t() @ x
    weights = [torch.randn(s, generator=generator, device=device) * 0.02 for s in shapes]
    nearest = [quantize(weight, spec) for weight in weights]
    factor_s, inverse = timed(lambda: inverse_factor(gram), device)
    assert inverse is not None
    round_s, found = timed(lambda: gptq(weights, nearest, inverse), device)
    return {
        "factor_s": factor_s,
        "round_s": round_s,
        "nearest": sum(x.nearest for x in found) / len(found),
        "error": sum(x.error for x in found) / len(found),
        "kept": sum(x.kept for x in found),
        "rows": sum(shape[0] for shape in shapes),
    }


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of the second of two runs, and its result."""
    seconds, result = 0.0, None
    for _ in range(2):
        wait(device)
        start = time.perf_counter()
        result = run()
        wait(device)
        seconds = time.perf_counter() - start
    return seconds, result


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
