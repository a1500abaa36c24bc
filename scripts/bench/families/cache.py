"""Decode attention over quantized KV caches."""

from collections.abc import Iterator
from functools import partial

import torch
from case import Case, Setup, first_rows, nbytes
from compressor_kernels.attention import quantized_cache as kernel
from compressor_kernels.attention.head_attention import full_decode_ref


def cases(setup: Setup) -> Iterator[Case]:
    step = setup.heads(*setup.pick((8, 32, 8, 32768, 128), (2, 4, 2, 200, 64)))
    q, k, v = step.q, step.k, step.v
    part = slice(0, 1)  # the references repeat keys in fp64
    case = partial(Case, shape=step.shape, limit=6e-3, error=first_rows)
    yield case("bf16", step.full.run, partial(full_decode_ref, *step.first), moved=nbytes(k, v))
    case = partial(case, peers={"bf16 cache": step.full})
    scale = torch.full((1,), 0.04, device=setup.device)
    scales = {"k_scale": scale, "v_scale": scale}
    for name, codes in (("KV8 int8", torch.int8), ("KV8 fp8", torch.float8_e4m3fn)):
        both = [kernel.quantize_kv8(t, scale, dtype=codes) for t in (k, v)]
        yield case(
            name,
            lambda i, b=both: kernel.kv8_decode(q, *b, **scales),
            partial(kernel.kv8_decode_ref, q[part], *(t[part] for t in both), **scales),
            moved=nbytes(*both),
        )
    (k4, k_params), (v4, v_params) = kernel.quantize_kv4(k), kernel.quantize_kv4(v)
    params = {"k_params": k_params, "v_params": v_params}
    of_part = {name: p[part] for name, p in params.items()}
    yield case(
        "KV4",
        lambda i: kernel.kv4_decode(q, k4, v4, **params),
        partial(kernel.kv4_decode_ref, q[part], k4[part], v4[part], **of_part),
        moved=nbytes(k4, v4, k_params, v_params),
    )
