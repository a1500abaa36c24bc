"""Decode attention over quantized KV caches."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Peer, Setup, first_rows, nbytes
from compressor_kernels.attention import quantized_cache as kernel
from compressor_kernels.attention.head_attention import full_decode, full_decode_ref

TILES = [kernel.CacheTiles(128, 4, 3, 4), kernel.CacheTiles(64, 4, 4, 8)]


def cases(setup: Setup) -> Iterator[Case]:
    batch, heads, groups, tokens, dim = setup.pick((8, 32, 8, 32768, 128), (2, 4, 2, 200, 64))
    q = setup.randn(batch, heads, 1, dim)
    k, v = (setup.randn(batch, groups, tokens, dim) for _ in range(2))
    shape = f"{batch}x{heads}/{groups}x{tokens}"
    bf16 = {"bf16 cache": Peer(lambda i: full_decode(q, k, v))}
    part = slice(0, 1)  # the references repeat keys in fp64
    case = partial(Case, shape=shape, limit=6e-3, error=first_rows)
    yield case(
        "bf16",
        bf16["bf16 cache"].run,
        partial(full_decode_ref, q[part], k[part], v[part]),
        moved=nbytes(k, v),
    )
    scale = torch.full((1,), 0.04, device=setup.device)
    scales = {"k_scale": scale, "v_scale": scale}
    for name, codes in (("KV8 int8", torch.int8), ("KV8 fp8", torch.float8_e4m3fn)):
        both = [kernel.quantize_kv8(t, scale, dtype=codes) for t in (k, v)]
        yield case(
            name,
            lambda i, tiles=None, b=both: kernel.kv8_decode(q, *b, **scales, tiles=tiles),
            partial(kernel.kv8_decode_ref, q[part], *(t[part] for t in both), **scales),
            moved=nbytes(*both),
            peers=bf16,
            tiles=TILES,
        )
    (k4, k_params), (v4, v_params) = kernel.quantize_kv4(k), kernel.quantize_kv4(v)
    params = {"k_params": k_params, "v_params": v_params}
    of_part = {name: p[part] for name, p in params.items()}
    yield case(
        "KV4",
        lambda i, tiles=None: kernel.kv4_decode(q, k4, v4, **params, tiles=tiles),
        partial(kernel.kv4_decode_ref, q[part], k4[part], v4[part], **of_part),
        moved=nbytes(k4, v4, k_params, v_params),
        peers=bf16,
        tiles=TILES,
    )
