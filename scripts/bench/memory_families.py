"""The families of `families.py` that are bound by memory: few tokens times packed weights,
activation quantizers, and decode attention over quantized caches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from compressor_kernels.attention.head_attention import full_decode
from compressor_kernels.attention.quantized_cache import (
    CacheTiles,
    kv4_decode,
    kv4_decode_ref,
    kv8_decode,
    kv8_decode_ref,
    quantize_kv4,
    quantize_kv8,
)
from compressor_kernels.inputs import activations_jit, nvfp4_inputs_jit
from compressor_kernels.inputs import nvfp4_inputs as fp4
from compressor_kernels.inputs.activations import quantize_tokens, quantize_tokens_ref
from compressor_kernels.linear import w4a8 as q
from compressor_kernels.linear import w4a8_jit, w4a16_jit
from compressor_kernels.linear import w4a16 as w
from compressor_kernels.linear.nvfp4 import nvfp4_matmul, nvfp4_matmul_ref
from rows import Row, gate, per_call_us
from sass import issued
from timing import relative_error
from torch import Tensor
from torch.nn.functional import linear

SETS = 8
WIDE = [(14336, 4096), (4096, 14336)]
OTHERS = [(4096, 4096), (4096, 11008), (8192, 8192)]  # outputs and inputs of other models' linears
FP16 = torch.float16


# What one token's tile is tried with, beside what is shipped.
FEW: list[dict[str, Any]] = [
    {"apart": False},
    {"num_stages": 2},
    {"num_stages": 4},
    {"block_n": 64},
    {"slices": 2, "num_warps": 2, "num_stages": 4},
]


def bits(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype, device="cuda")


def int4(outputs: int, inner: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    groups = inner // 128
    return [
        (
            bits(outputs, inner // 8),
            torch.rand(outputs, groups, dtype=FP16, device="cuda") * 0.01,
            bits(outputs // 8, groups),
        )
        for _ in range(SETS)
    ]


def cublas_us(count: int, outputs: int, inner: int, dtype: torch.dtype = FP16) -> float:
    x = torch.randn(count, inner, dtype=dtype, device="cuda")
    dense = [torch.randn(outputs, inner, dtype=dtype, device="cuda") for _ in range(4)]
    return per_call_us(lambda i: linear(x, dense[i]), sets=4)


def nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    rows: list[Row],
    family: str,
    name: str,
    shape: str,
    run: Callable[[int], Tensor],
    *,
    want: Tensor,
    limit: float,
    moved: float,
    peer: str,
    peer_us: float,
    target: float | None = None,
    sets: int = SETS,
) -> float:
    """Check, time and add a row whose rate is GB/s of `moved` bytes; microseconds, NaN if red."""
    if not gate(f"{name} {shape}", lambda: relative_error(run(0), want), limit):
        return float("nan")
    us = per_call_us(run, sets=sets)
    rate = moved / us / 1e3
    rows.append(Row(family, name, shape, us, rate, "GB/s", peer, peer_us / us, target))
    return us


def int4_product(
    rows: list[Row],
    name: str,
    x: Tensor,
    weights: Sequence[tuple[Tensor, ...]],
    *,
    want: Tensor,
    dense_us: float,
    tiles: w.DecodeTiles | w.TiledTiles | None = None,
    target: float | None = None,
) -> None:
    """`measure` for few tokens x [M, I] by int4 weights, as shipped or with these tiles."""
    shape = f"{len(x)}x{len(weights[0][0])}x{x.shape[1]}"
    measure(
        rows, "w4a16", name, shape,
        lambda i: w.w4a16(x, *weights[i], group_size=128, tiles=tiles),
        want=want, limit=1e-3, moved=nbytes(weights[0]), peer="cuBLAS fp16",
        peer_us=dense_us, target=target,
    )  # fmt: skip


def w4a16_family(ceiling: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    decode, tiled = w.DecodeTiles, w.TiledTiles
    some = [decode(64, 4, 1, 4, 2), decode(64, 4, 4, 4, 2), decode(64, 2, 4, 2, 3),
            tiled(128, 16, 2, 4, 4)]  # fmt: skip
    for outputs, inner in WIDE:
        weights = int4(outputs, inner)
        shipped = w.decode_tiles(1, outputs, inner, 128, zeros=True)
        few = [replace(shipped, **changed) for changed in FEW]
        for count, target, candidates in ((1, 2.5, few), (16, 1.8, some)):
            x = torch.randn(count, inner, dtype=FP16, device="cuda")
            want = w.w4a16_ref(x.double(), *weights[0], group_size=128)
            dense = cublas_us(count, outputs, inner)
            for tiles in [None, *candidates] if sweep else [None]:
                name = f"asymmetric g128 {tiles or ''}".replace("num_", "")
                int4_product(
                    rows, name, x, weights, want=want, dense_us=dense, tiles=tiles,
                    target=None if tiles else target,
                )  # fmt: skip
                if tiles is None:
                    t = w.decode_tiles(count, outputs, inner, 128, zeros=True)
                    run = partial(w.w4a16, x, *weights[0], group_size=128)
                    _issued("weight", w4a16_jit.decode_kernel, run, 128 * t.slices * t.block_n)
            without = [(packed, scales) for packed, scales, _ in weights]
            want = w.w4a16_ref(x.double(), *without[0], group_size=128)
            int4_product(
                rows, "symmetric g128", x, without, want=want, dense_us=dense, target=target
            )
    for outputs, inner in OTHERS:
        others = int4(outputs, inner)
        x = torch.randn(1, inner, dtype=FP16, device="cuda")
        want = w.w4a16_ref(x.double(), *others[0], group_size=128)
        dense = cublas_us(1, outputs, inner)
        int4_product(rows, "asymmetric g128", x, others, want=want, dense_us=dense)
    outputs, inner, count = *WIDE[0], 2048
    many = int4(outputs, inner)
    x = torch.randn(count, inner, dtype=FP16, device="cuda")
    want = w.w4a16_ref(x.double(), *many[0], group_size=128)
    dense = cublas_us(count, outputs, inner)
    shape = f"{count}x{outputs}x{inner}"

    def plainly(i: int) -> Tensor:
        weight = w.w4a16_dequantize(*many[i], in_features=inner, group_size=128)
        return linear(x, weight)

    # A card slows down as it warms: what is the same two launches is timed before and after.
    apart = per_call_us(plainly, sets=4)
    fused = [
        tiled(128, 64, 1, 4, 4),
        tiled(128, 128, 1, 8, 3),
        tiled(256, 64, 1, 8, 3),
    ]
    for tiles in [None, *(fused if sweep else fused[:1])]:
        name = f"fused {tiles}".replace("num_", "") if tiles else "as shipped"
        us = measure(
            rows, "w4a16", name, shape,
            lambda i, t=tiles: w.w4a16(x, *many[i], group_size=128, tiles=t),
            want=want, limit=2e-3, moved=nbytes(weights[0]), peer="dequantize + cuBLAS",
            peer_us=apart, target=None if tiles else 0.98, sets=4,
        )  # fmt: skip
        if tiles is None and us == us:
            apart = (apart + per_call_us(plainly, sets=4)) / 2
            rows[-1] = replace(rows[-1], share=apart / us)
    rows.append(Row("w4a16", "cuBLAS fp16 alone", shape, dense, 0, "", "shipped", dense / apart))
    return rows


def nvfp4_family(ceiling: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    outputs, inner = WIDE[0]
    plain = int4(outputs, inner)
    weights = [
        (
            bits(outputs, inner // 2, dtype=torch.uint8),
            (torch.rand(outputs, inner // 16, device="cuda") * 448).to(torch.float8_e4m3fn),
            torch.full((1,), 1e-5, device="cuda"),
        )
        for _ in range(SETS)
    ]
    decode = w.DecodeTiles
    few = [decode(16, 8, 1, 8, 4), decode(32, 4, 1, 4, 4), decode(16, 4, 1, 4, 4),
           decode(32, 4, 2, 4, 4), decode(32, 8, 1, 8, 3)]  # fmt: skip
    for count in (1, 16, 64, 2048):
        x = torch.randn(count, inner, dtype=FP16, device="cuda")
        want = nvfp4_matmul_ref(x.double(), *weights[0])
        shape = f"{count}x{outputs}x{inner}"
        ours = per_call_us(lambda i, x=x: w.w4a16(x, *plain[i], group_size=128), sets=SETS)
        dense = cublas_us(count, outputs, inner)
        us = float("nan")
        for tiles in [None, *few] if sweep and count == 1 else [None]:
            name = f"weight only {tiles or ''}".replace("num_", "")
            took = measure(
                rows, "nvfp4", name, shape,
                lambda i, t=tiles, x=x: nvfp4_matmul(x, *weights[i], tiles=t),
                want=want, limit=2e-3, moved=nbytes(weights[0]), peer="our W4A16", peer_us=ours,
                target=0.8 if count == 1 and tiles is None else None,
            )  # fmt: skip
            us = took if tiles is None else us
            if tiles is None and count <= w.DECODE_TOKENS:
                t = w.decode_tiles(count, outputs, inner, 16)
                run = partial(nvfp4_matmul, x, *weights[0])
                _issued("weight", w4a16_jit.decode_kernel, run, 128 * t.slices * t.block_n)
        moved = nbytes(weights[0]) / us / 1e3
        rows.append(
            Row("nvfp4", "weight only", shape, us, moved, "GB/s", "cuBLAS fp16", dense / us)
        )
    return rows


def w4a8_family(ceiling: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    outputs, inner = WIDE[0]
    groups = inner // 128
    weights = [
        {
            "qweight": bits(outputs, inner // 2, dtype=torch.int8),
            "s1_scales": torch.rand(outputs, dtype=FP16, device="cuda") * 0.001,
            "s2_scales": torch.randint(1, 17, (groups, outputs), dtype=torch.int8, device="cuda"),
            "s2_zeros": torch.randint(-120, 1, (groups, outputs), dtype=torch.int8, device="cuda"),
        }
        for _ in range(SETS)
    ]
    decode, tiled = q.DecodeTiles, q.TiledTiles
    few = [decode(64, 4, 1, 4), decode(32, 4, 1, 4), decode(32, 8, 1, 4),
           decode(64, 8, 1, 3), decode(64, 4, 2, 3), decode(128, 4, 4, 3)]  # fmt: skip
    many = [tiled(128, 128, 4, 3), tiled(256, 64, 8, 3), tiled(256, 128, 8, 3)]
    for count, target, candidates in ((1, None, few[:2]), (16, 1.5, few), (2048, None, many)):
        a = torch.randint(-127, 128, (count, inner), dtype=torch.int8, device="cuda")
        scales = torch.rand(count, device="cuda") * 0.01
        want = q.w4a8_ref(a, **weights[0], row_scales=scales)
        dense = cublas_us(count, outputs, inner)
        shape = f"{count}x{outputs}x{inner}"
        for tiles in [None, *candidates] if sweep else [None]:
            measure(
                rows, "w4a8", f"progressive g128 {tiles or ''}".replace("num_", ""), shape,
                lambda i, t=tiles, a=a, s=scales: q.w4a8(a, **weights[i], row_scales=s, tiles=t),
                want=want, limit=1e-3, moved=nbytes(tuple(weights[0].values())),
                peer="cuBLAS fp16", peer_us=dense, target=None if tiles else target,
            )  # fmt: skip
            if tiles is None and count <= q.DECODE_TOKENS:
                t = q.decode_tiles(count, outputs, inner)
                run = partial(q.w4a8, a, **weights[0], row_scales=scales)
                _issued("weight", w4a8_jit.decode_kernel, run, 128 * t.slices * t.block_n)
    return rows


def inputs(ceiling: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    for count, width in ((16384, 4096), (8192, 14336)):
        x = [torch.randn(count, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        shape = f"{count}x{width}"
        for dtype in (torch.int8, torch.float8_e4m3fn):
            ours = quantize_tokens(x[0], dtype=dtype)
            theirs = quantize_tokens_ref(x[0], dtype=dtype)
            name = f"per token {str(dtype).removeprefix('torch.')}"
            wrong = (ours[0].float() != theirs[0].float()).sum() + (ours[1] != theirs[1]).sum()
            if not gate(f"{name} {shape}, codes that differ", wrong.item, 0):
                continue
            us = per_call_us(lambda i, x=x, d=dtype: quantize_tokens(x[i], dtype=d), sets=2)
            moved = nbytes((x[0], *ours))
            rows.append(_part(name, shape, us, moved, ceiling, 0.8))
            run = partial(quantize_tokens, x[0], dtype=dtype)
            values = max(4096, 1 << (width - 1).bit_length())
            _issued("value", activations_jit.tokens_kernel, run, values)
        amax = x[0].abs().amax().float().reshape(1)
        for rule, target in (("static_6", 0.6), ("mse", 0.4), ("mae", 0.4), ("abs_max", 0.4)):
            options = {"rule": rule, "amax": amax}
            ours = fp4.quantize_nvfp4_inputs(x[0], **options)
            theirs = fp4.quantize_nvfp4_inputs_ref(x[0], **options)
            wrong = (ours[0] != theirs[0]).float().mean()
            limit = 0.0 if rule == "static_6" else 1e-3  # errors that are equal to rounding
            if not gate(f"NVFP4 {rule} {shape}, bytes that differ", wrong.item, limit):
                continue
            us = per_call_us(lambda i, x=x, o=options: fp4.quantize_nvfp4_inputs(x[i], **o), sets=2)
            rows.append(_part(f"NVFP4 {rule}", shape, us, nbytes((x[0], *ours)), ceiling, target))
            run = partial(fp4.quantize_nvfp4_inputs, x[0], **options)
            _issued("value", nvfp4_inputs_jit.inputs_kernel, run, 16 * fp4.rows_of_program(rule))
    return rows


def _issued(item: str, kernel: object, run: Callable[[], object], items: int) -> None:
    print(f"    per {item}: {issued(kernel, run, items=items)}")


def _part(
    name: str, shape: str, us: float, moved: float, ceiling: float, target: float | None
) -> Row:
    rate = moved / us / 1e3
    return Row("inputs", name, shape, us, rate, "GB/s", "of copy", rate / ceiling, target)


def cache(ceiling: float, sweep: bool) -> list[Row]:
    rows: list[Row] = []
    batch, heads, groups, tokens, dim = 8, 32, 8, 32768, 128
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    q = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    k, v = (
        torch.randn(batch, groups, tokens, dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    )
    plain = per_call_us(lambda i: full_decode(q, k, v), sets=1)
    moved = nbytes((k, v))
    rows.append(Row("cache", "bf16 cache", shape, plain, moved / plain / 1e3, "GB/s", "of copy",
                    moved / plain / 1e3 / ceiling))  # fmt: skip
    scale = torch.full((1,), 0.04, device="cuda")
    (k4, k_params), (v4, v_params) = quantize_kv4(k), quantize_kv4(v)
    params = {"k_params": k_params, "v_params": v_params}
    scales = {"k_scale": scale, "v_scale": scale}
    first = slice(0, 1)  # the reference repeats keys in fp64
    for name, codes in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        both = [quantize_kv8(t, scale, dtype=codes) for t in (k, v)]
        want = kv8_decode_ref(q[first], *(t[first] for t in both), **scales)
        for tiles in _cache_tiles(sweep):
            call = partial(kv8_decode, q, *both, **scales, tiles=tiles)
            if not gate(f"KV8 {name} {shape}", lambda c=call, w=want: _first(c, w), 6e-3):
                continue
            us = per_call_us(lambda i, c=call: c(), sets=1)
            rows.append(_cache_row(f"KV8 {name}", tiles, shape, us, nbytes(tuple(both)), plain))
    part = {n: p[first] for n, p in params.items()}
    want = kv4_decode_ref(q[first], k4[first], v4[first], **part)
    for tiles in _cache_tiles(sweep):
        call = partial(kv4_decode, q, k4, v4, **params, tiles=tiles)
        if not gate(f"KV4 {shape}", lambda c=call: _first(c, want), 6e-3):
            continue
        us = per_call_us(lambda i, c=call: c(), sets=1)
        moved = nbytes((k4, v4, k_params, v_params))
        rows.append(_cache_row("KV4", tiles, shape, us, moved, plain))
    return rows


def _first(call: Callable[[], Tensor], want: Tensor) -> float:
    return relative_error(call()[: len(want)], want)


def _cache_tiles(sweep: bool) -> list[CacheTiles | None]:
    return [None, CacheTiles(128, 4, 3, 4), CacheTiles(64, 4, 4, 8)] if sweep else [None]


def _cache_row(
    name: str, tiles: CacheTiles | None, shape: str, us: float, moved: float, plain: float
) -> Row:
    name = f"{name} {tiles or ''}".replace("num_", "")
    return Row("cache", name, shape, us, moved / us / 1e3, "GB/s", "bf16 cache", plain / us)
