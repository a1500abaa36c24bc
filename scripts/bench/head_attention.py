"""Benchmark attention with full and streaming heads on the current CUDA device.

    python scripts/bench/head_attention.py          # check, then time against PyTorch's backends
    python scripts/bench/head_attention.py --tune   # check, then sweep tile shapes

Llama-3-8B's shape: 32 query heads over 8 KV heads of 128, bf16, 32k tokens; half of the KV heads
stream (128 sink tokens, 256 recent ones). Correctness is checked first; a failure stops the run.
With the environment variable OUT set, all figures go to OUT/head_attention*.json.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from compressor_kernels.attention.head_attention import (
    DecodeTiles,
    PrefillTiles,
    full_decode,
    full_decode_ref,
    head_decode,
    head_decode_ref,
    head_order,
    head_prefill,
    head_prefill_ref,
)
from timing import copy_gbps, graph_ms, relative_error, require, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, GROUPS, DIM, TOKENS, SINK, WINDOW = 32, 8, 128, 32768, 128, 256
DECODE_BATCH = 8
STREAMING = torch.tensor([True, False] * (GROUPS // 2))
NONE = torch.zeros(GROUPS, dtype=torch.bool)

PREFILL_CANDIDATES = [
    PrefillTiles(128, 64, 8, 3, True),
    PrefillTiles(128, 64, 8, 3, False),
    PrefillTiles(128, 64, 8, 4, True),
    PrefillTiles(128, 128, 8, 2, False),
    PrefillTiles(128, 128, 8, 2, True),
    PrefillTiles(128, 128, 8, 3, False),
    PrefillTiles(128, 32, 4, 3, False),
    PrefillTiles(64, 64, 4, 3, True),
]
DECODE_CANDIDATES = [
    DecodeTiles(block, warps, stages, per_sm)
    for (block, warps, stages), per_sm in itertools.product(
        [(32, 2, 4), (64, 2, 3), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3)],
        [2, 4, 8],
    )
]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def check(prefill: list[PrefillTiles], decode: list[DecodeTiles]) -> None:
    """Every candidate against the references: odd lengths, chunks, head sizes, short caches."""
    print("Correctness, relative error against fp32:")
    cases = [  # batch, query heads, KV heads, Tq, Tk, D, sink, window
        (2, 8, 4, 1000, 1000, 128, 128, 256),
        (1, 8, 2, 333, 1501, 128, 5, 100),
        (1, 4, 4, 517, 517, 64, 70, 1),
        (1, 6, 3, 300, 300, 96, 0, 129),
        (1, 4, 2, 400, 450, 32, 600, 8),
    ]
    for tiles in prefill:
        worst = 0.0
        for batch, heads, groups, q_len, k_len, dim, sink, window in cases:
            for dtype in (torch.bfloat16, torch.float16):
                q = randn(batch, heads, q_len, dim, dtype=dtype)
                k, v = (randn(batch, groups, k_len, dim, dtype=dtype) for _ in range(2))
                streaming = torch.arange(groups, device="cuda") % 2 == 0
                options = {"streaming": streaming, "sink": sink, "window": window}
                out = head_prefill(q, k, v, **options, tiles=tiles)
                error = relative_error(out, head_prefill_ref(q, k, v, **options))
                worst = max(worst, error) if error == error else float("inf")
        require(f"prefill {short(tiles)}", worst, 6e-3)
    for tiles in decode:
        worst = 0.0
        for heads, full, stream, tokens, dim in [(8, 1, 1, 5000, 128), (6, 2, 1, 777, 64)]:
            q = randn(3, heads, 1, dim)
            caches = [randn(3, full, tokens, dim) for _ in range(2)]
            caches += [randn(3, stream, 384, dim) for _ in range(2)]
            options = {
                "order": head_order(torch.arange(full + stream, device="cuda") % 2 == 0),
                "full_len": torch.tensor([tokens, 1, tokens - 7], dtype=torch.int32).cuda(),
                "stream_len": torch.tensor([384, 1, 65], dtype=torch.int32).cuda(),
            }
            out = head_decode(q, *caches, **options, tiles=tiles)
            again = head_decode(q, *caches, **options, tiles=tiles)
            error = relative_error(out, head_decode_ref(q, *caches, **options))
            worst = max(worst, error) if torch.equal(out, again) else float("inf")
        require(f"decode {short(tiles)}", worst, 6e-3)


def short(tiles: PrefillTiles | DecodeTiles) -> str:
    return str(tiles).replace("num_", "").replace("block_", "")


def prefill_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(1, HEADS, TOKENS, DIM),
        randn(1, GROUPS, TOKENS, DIM),
        randn(1, GROUPS, TOKENS, DIM),
    )


def ours(q: Tensor, k: Tensor, v: Tensor, heads: Tensor, tiles: PrefillTiles) -> Tensor:
    return head_prefill(q, k, v, streaming=heads, sink=SINK, window=WINDOW, tiles=tiles)


def torch_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """PyTorch's attention by one backend; KV heads repeated up front where it knows no groups."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        run()
    except RuntimeError:
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    return run


def bench_prefill(results: dict[str, float]) -> None:
    q, k, v = prefill_inputs()
    tiles = PrefillTiles()
    none, mixed = NONE.cuda(), STREAMING.cuda()
    flash = torch_backend(SDPBackend.FLASH_ATTENTION, q, k, v)
    cudnn = torch_backend(SDPBackend.CUDNN_ATTENTION, q, k, v)
    out = ours(q, k, v, none, tiles)
    require("prefill 32k, full, against the flash backend", relative_error(out, flash()), 6e-3)
    tail = head_prefill_ref(q[:, :, -64:], k, v, streaming=mixed, sink=SINK, window=WINDOW)
    out = ours(q, k, v, mixed, tiles)[:, :, -64:]
    require("prefill 32k, mixed, last 64 queries", relative_error(out, tail), 6e-3)

    flops = 2 * TOKENS * TOKENS * DIM * HEADS
    rows = {
        "PyTorch flash": flash,
        "PyTorch cuDNN": cudnn,
        "ours, all heads full": lambda: ours(q, k, v, none, tiles),
        "ours, half of the KV heads streaming": lambda: ours(q, k, v, mixed, tiles),
    }
    times = {name: graph_ms(run, repeats=10) for name, run in rows.items()}
    dense = min(times["PyTorch flash"], times["PyTorch cuDNN"])
    print(f"\nPrefill, {TOKENS} tokens, {HEADS}/{GROUPS} heads of {DIM}, bf16, causal")
    for name, ms in times.items():
        rate = "" if "streaming" in name else f"{flops / ms / 1e9:7.0f} TFLOP/s"
        print(f"  {name:<40} {ms:8.2f} ms  {dense / ms:5.2f}x fastest dense {rate}")
    full = times["ours, all heads full"]
    print(f"  our full prefill / flash backend: {times['PyTorch flash'] / full:.2f}x")
    results |= {f"prefill {name} ms": ms for name, ms in times.items()}


def decode_inputs() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    half = GROUPS // 2
    full = [randn(DECODE_BATCH, GROUPS, TOKENS, DIM) for _ in range(2)]
    split = [randn(DECODE_BATCH, half, TOKENS, DIM) for _ in range(2)]
    split += [randn(DECODE_BATCH, half, SINK + WINDOW, DIM) for _ in range(2)]
    return randn(DECODE_BATCH, HEADS, 1, DIM), full, split


def gbps(tensors: list[Tensor], ms: float) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / ms / 1e6


def bench_decode(results: dict[str, float]) -> None:
    q, full, split = decode_inputs()
    order = head_order(STREAMING.cuda())
    out = full_decode(q, *full)
    require("decode 32k, full", relative_error(out, full_decode_ref(q, *full)), 6e-3)
    out = head_decode(q, *split, order=order)
    want = head_decode_ref(q, *split, order=order)
    require("decode 32k, mixed", relative_error(out, want), 6e-3)

    ceiling = copy_gbps()
    dense = graph_ms(lambda: full_decode(q, *full), inner=4)
    mixed = graph_ms(lambda: head_decode(q, *split, order=order), inner=4)
    print(f"\nDecode, batch {DECODE_BATCH}, {TOKENS} tokens; copy ceiling {ceiling:.0f} GB/s")
    for name, ms, cache in [("all heads full", dense, full), ("half streaming", mixed, split)]:
        rate = gbps(cache, ms)
        print(
            f"  ours, {name:<20} {ms * 1e3:8.1f} us {rate:6.0f} GB/s of KV "
            f"= {rate / ceiling:.0%} of copy, {dense / ms:.2f}x full"
        )
    results |= {"decode full ms": dense, "decode mixed ms": mixed, "copy GB/s": ceiling}


def tune() -> dict[str, float]:
    q, k, v = prefill_inputs()
    none = NONE.cuda()
    times = {
        f"prefill {short(t)}": graph_ms(lambda t=t: ours(q, k, v, none, t), repeats=5)
        for t in PREFILL_CANDIDATES
    }
    q, full, split = decode_inputs()
    order = head_order(STREAMING.cuda())
    for t in DECODE_CANDIDATES:
        times[f"decode full {short(t)}"] = graph_ms(lambda t=t: full_decode(q, *full, tiles=t))
        times[f"decode mixed {short(t)}"] = graph_ms(
            lambda t=t: head_decode(q, *split, order=order, tiles=t)
        )
    for kind in ("prefill", "decode full", "decode mixed"):
        print(f"\nBest of {kind}:")
        for name in sorted((n for n in times if n.startswith(kind)), key=times.__getitem__)[:8]:
            print(f"  {times[name]:9.4f} ms  {name}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep tile shapes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    if arguments.tune:
        check(PREFILL_CANDIDATES, [t for t in DECODE_CANDIDATES if t.programs_per_sm == 4])
        save("head_attention_tune.json", tune())
        return
    check([PrefillTiles()], [DecodeTiles()])
    results: dict[str, float] = {}
    bench_prefill(results)
    torch.cuda.empty_cache()
    bench_decode(results)
    save("head_attention.json", results)


if __name__ == "__main__":
    main()
