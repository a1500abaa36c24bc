"""Decode attention over quantized KV caches."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from case import Call, Case, Heads, Setup, first
from compressor_kernels.attention import quantized_cache as kernel
from compressor_kernels.attention.head_attention import full_decode, full_decode_ref
from torch import Tensor


def over_caches(step: Heads) -> Iterator[tuple[str, Call, Callable[..., Tensor]]]:
    """A decoding step over quantized forms of a cache, with what it is held against."""
    scale = torch.full((1,), 0.04, device=step.k.device)
    scales = {"k_scale": scale, "v_scale": scale}
    for name, codes in (("KV8 int8", torch.int8), ("KV8 fp8", torch.float8_e4m3fn)):
        both = (kernel.quantize_kv8(t, scale, dtype=codes) for t in (step.k, step.v))
        yield name, Call(kernel.kv8_decode, [(step.q, *both)], scales), first(kernel.kv8_decode_ref)
    (k, k_params), (v, v_params) = kernel.quantize_kv4(step.k), kernel.quantize_kv4(step.v)
    params = {"k_params": k_params, "v_params": v_params}
    yield "KV4", Call(kernel.kv4_decode, [(step.q, k, v)], params), first(kernel.kv4_decode_ref)


def cases(setup: Setup) -> Iterator[Case]:
    step = setup.heads(*setup.pick((8, 32, 8, 32768, 128), (2, 4, 2, 200, 64)))
    case = partial(Case, shape=step.shape, limit=6e-3)
    yield case(full_decode, [step.all], name="bf16", reference=first(full_decode_ref))
    case = partial(case, peers={"bf16 cache": step.full})
    for name, call, reference in over_caches(step):
        yield case(call.function, call.sets, call.how, name=name, reference=reference)
