"""Check of the kernels that attend over a quantized cache: one decoding step of each block.

Keys and values are random ones that fill the range of the block's scales. They are quantized as a
runtime stores them and go through the kernel; what is expected is float64 attention over what
`fake_quantize_kv`, which evaluations use, makes of the same ones.
"""

import torch
from compressor_kernels.attention import quantized_cache as kernels
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.layout import AttentionShape
from compressor.ir.scheme import KVSpec
from compressor.numerics.activations import LARGEST, fake_quantize_kv
from compressor.verify.kernels.check import KernelResult, interpreter_runs, layer_seed

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
TOKENS = {"cpu": 40, "cuda": 600}
LOSS = 6e-3
"""Of the largest value: half-precision queries, weights and outputs."""


def cache_kernel(shape: AttentionShape, kv: KVSpec) -> str | None:
    """The kernel that attends over such a cache, or None."""
    if shape.head_dim % 16 or shape.head_dim > 256 or shape.heads % shape.kv_heads:
        return None
    return "kv4_decode" if kv.element == "int4" else "kv8_decode"


def check_cache(
    path: str,
    shape: AttentionShape,
    kv: KVSpec,
    scales: tuple[Tensor, Tensor] | None,
    *,
    device: torch.device,
    seed: int,
) -> KernelResult:
    """Attend once over a cache of the block at `path`, whose stored scales are of [1] or
    [kv_heads] keys and values. Raises InputError where they are missing."""
    name = "kv4_decode" if kv.element == "int4" else "kv8_decode"
    generator = torch.Generator().manual_seed(layer_seed(path, seed))
    size = (1, shape.kv_heads, TOKENS[device.type], shape.head_dim)
    both = [torch.randn(size, generator=generator).to(device) for _ in range(2)]
    if kv.element != "int4":
        if scales is None or any(s.numel() not in (1, shape.kv_heads) for s in scales):
            raise InputError(f"{path} has no scales for its cache")
        scales = (scales[0].float().to(device), scales[1].float().to(device))
        spread = [s.reshape(1, -1, 1, 1) * LARGEST[kv.element] / 3 for s in scales]
        both = [x * by for x, by in zip(both, spread, strict=True)]
    seen = [
        fake_quantize_kv(x, kv, None if scales is None or kv.element == "int4" else scale).double()
        for x, scale in zip(both, scales or (None, None), strict=True)
    ]
    # Scores of about one: all keys have a say.
    query = torch.randn(1, shape.heads, 1, shape.head_dim, generator=generator).to(device)
    query = (query / both[0].square().mean().sqrt()).half()
    triton = device.type == "cuda" or interpreter_runs()
    if kv.element == "int4":
        k, k_params = kernels.quantize_kv4(both[0])
        v, v_params = kernels.quantize_kv4(both[1])
        attend4 = kernels.kv4_decode if triton else kernels.kv4_decode_ref
        found = attend4(query, k, v, k_params=k_params, v_params=v_params)
    else:
        assert scales is not None
        k, v = (
            kernels.quantize_kv8(x, scale, dtype=CODES[kv.element])
            for x, scale in zip(both, scales, strict=True)
        )
        attend8 = kernels.kv8_decode if triton else kernels.kv8_decode_ref
        found = attend8(query, k, v, k_scale=scales[0], v_scale=scales[1])
    keys, values = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in seen)
    scores = query.double() @ keys.mT * shape.head_dim**-0.5
    expected = scores.softmax(-1) @ values
    difference = (found.double() - expected).abs()
    most = values.abs().amax(dim=(2, 3), keepdim=True)
    wrong = ~(difference <= LOSS * most)
    error = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    problem = ""
    if bool(wrong.any()):
        head = int(wrong.nonzero()[0, 1])
        problem = f"{name} attends otherwise than float64 in head {head} ({int(wrong.sum())} wrong)"
    return KernelResult(kernel=name, triton=triton, error=error, problem=problem)
