"""One decoding step over a cache of 4-bit or 8-bit keys and values.

8 bit  int8 or float8_e4m3fn codes [B, G, T, D], value = code · scale, one scale for everything or
       one for each KV head, as checkpoints store them
4 bit  codes of 0 … 15, value = code · step − zero with an fp16 step and zero for each token and
       head (QoQ, arXiv 2405.04532), which no checkpoint stores:
         packed  uint8 [B, G, T, D/2], the even channel in the low half
         params  fp16 [B, G, T, 2], step and zero
Neither keys nor values are dequantized. A key's step and zero are applied to its score,
q · (code · step − zero) = step · (q · code) − zero · Σ q, and a value's to its weight. Keys are
split among programs and merged in a fixed order.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compressor_kernels.attention.head_attention import DecodeTiles, full_decode_ref, listed_keys
from compressor_kernels.triton.launch import LOG2_E, pow2, ranges, score_scale

CODES = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_kv4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [..., D] to packed codes uint8 [..., D/2] and params fp16 [..., 2].

    step = fp16((max − min) / 15), 1 if that is 0; zero = fp16(−min)
    """
    if x.shape[-1] % 2:
        raise ValueError(f"{x.shape[-1]} channels do not pair up")
    values = x.float()
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    step = ((high - low) / torch.full_like(low, 15.0)).clamp(max=65504).half()
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = (-low).clamp(-65504, 65504).half()
    codes = ((values + zero.float()) / step.float()).round().clamp(0, 15).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), torch.cat([step, zero], dim=-1)


def dequantize_kv4(packed: Tensor, params: Tensor) -> Tensor:
    """fp32 [..., D] of what `quantize_kv4` gives; fp64 for fp64 params."""
    exact = torch.float64 if params.dtype == torch.float64 else torch.float32
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(exact)
    return codes * params[..., :1].to(exact) - params[..., 1:].to(exact)


def quantize_kv8(x: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Keys or values [B, G, T, D] to int8 or E4M3 codes on a scale of one value or [G]."""
    if dtype not in CODES or scale.numel() not in (1, x.shape[1]):
        raise ValueError(f"{dtype} codes of {x.shape[1]} heads on {scale.numel()} scales")
    steps = x.float() / scale.float().reshape(1, -1, 1, 1)
    lowest = -128.0 if dtype == torch.int8 else -448.0
    steps = steps.clamp(lowest, LARGEST[dtype])
    return (steps.round() if dtype == torch.int8 else steps).to(dtype)


def kv8_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """q [B, H, 1, D] in fp16 or bf16 over 8-bit k and v [B, G, T, D]: [B, H, 1, D] in q's dtype.

    k_scale, v_scale  any float, one value or one for each KV head
    lengths           int32 [B], tokens in use, at least one; all if None
    blocks            int32 [B, G, K] ascending and then -1: blocks of block_size keys (whole tiles)
                      that are read, all if None
    scale             of scores, 1/sqrt(D) if None
    The same inputs give the same bits. Raises ValueError on what does not fit.
    """
    _check_kv8(q, k, v, k_scale, v_scale)
    _check(q, k.shape[-1], k, v, lengths)
    scales = [s.float().reshape(-1).expand(k.shape[1]).contiguous() for s in (k_scale, v_scale)]
    return _launch(q, k, v, *scales, lengths, blocks, block_size, scale, tiles, packed=False)


def kv8_decode_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """`kv8_decode` in plain PyTorch, computed in fp64."""
    _check_kv8(q, k, v, k_scale, v_scale)
    k, v = (x.double() * s.double().reshape(1, -1, 1, 1) for x, s in ((k, k_scale), (v, v_scale)))
    read = listed_keys(blocks, k.shape[2], block_size=block_size)
    return full_decode_ref(q.double(), k, v, lengths=lengths, read=read, scale=scale).to(q.dtype)


def kv4_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_params: Tensor,
    v_params: Tensor,
    lengths: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """`kv8_decode` over packed 4-bit k and v [B, G, T, D/2], params [B, G, T, 2]."""
    _check_kv4(q, k, v, k_params, v_params)
    _check(q, k.shape[-1] * 2, k, v, lengths)
    params = (p.contiguous().view(torch.int32) for p in (k_params, v_params))
    return _launch(q, k, v, *params, lengths, blocks, block_size, scale, tiles, packed=True)


def kv4_decode_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_params: Tensor,
    v_params: Tensor,
    lengths: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """`kv4_decode` in plain PyTorch, computed in fp64."""
    _check_kv4(q, k, v, k_params, v_params)
    k, v = (dequantize_kv4(x, p.double()) for x, p in ((k, k_params), (v, v_params)))
    read = listed_keys(blocks, k.shape[2], block_size=block_size)
    return full_decode_ref(q.double(), k, v, lengths=lengths, read=read, scale=scale).to(q.dtype)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    lengths: Tensor | None,
    blocks: Tensor | None,
    block_size: int,
    scale: float | None,
    tiles: DecodeTiles | None,
    *,
    packed: bool,
) -> Tensor:
    from compressor_kernels.attention import quantized_cache_jit as jit

    fp8 = k.dtype == torch.float8_e4m3fn
    if tiles is None:
        tiles = DecodeTiles(num_stages=4, programs_per_sm=8) if fp8 else DecodeTiles()
        tiles = DecodeTiles(block_n=128) if packed else tiles
        if blocks is not None and block_size < tiles.block_n:
            tiles = replace(tiles, block_n=block_size)
    if blocks is not None and block_size % tiles.block_n:
        raise ValueError(f"blocks of {block_size} keys are not whole tiles of {tiles.block_n}")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, heads, _, dim = q.shape
    groups, tokens = k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    if not out.numel():
        return out
    k, v = (x.view(torch.uint8) if fp8 else x for x in (k, v))
    chosen = 1 if blocks is None else blocks.shape[2]
    read = tokens if blocks is None else min(tokens, chosen * block_size)
    most = read // (2 * tiles.block_n)
    splits = ranges(q, lanes=batch * groups, most=most, programs_per_sm=tiles.programs_per_sm)
    rows = batch * heads * splits
    parts = torch.empty((rows, dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((rows,), dtype=torch.float32, device=q.device)
    block_d = pow2(dim)
    kernel = jit.kv4_kernel if packed else jit.kv8_kernel
    kernel[(batch * groups, splits)](
        q,
        k,
        v,
        k_scales,
        v_scales,
        lengths,
        None if blocks is None else blocks.contiguous(),
        parts,
        weights,
        tokens,
        score_scale(scale, dim) * LOG2_E,
        D=dim,
        G=groups,
        GROUP=heads // groups,
        SPLITS=splits,
        K=chosen,
        K_POW2=pow2(chosen),
        BLOCK=block_size,
        BLOCK_G=max(16, pow2(heads // groups)),
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        FP8=fp8,
        ASM=q.is_cuda,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    jit.merge_kernel[(batch * heads,)](
        parts,
        weights,
        out,
        D=dim,
        SPLITS=splits,
        BLOCK_S=pow2(splits),
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def _check_kv8(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
    if k.dtype not in CODES or v.dtype != k.dtype or k.dim() != 4:
        raise ValueError(f"k and v are int8 or float8_e4m3fn, not {k.dtype} and {v.dtype}")
    for scale in (k_scale, v_scale):
        if scale.numel() not in (1, k.shape[1]) or not scale.is_floating_point():
            raise ValueError(f"{scale.dtype} {list(scale.shape)}: one scale or one a KV head")


def _check_kv4(q: Tensor, k: Tensor, v: Tensor, k_params: Tensor, v_params: Tensor) -> None:
    if k.dtype != torch.uint8 or v.dtype != torch.uint8 or k.dim() != 4:
        raise ValueError(f"packed k and v are uint8 [B, G, T, D/2], not {k.dtype} and {v.dtype}")
    for params in (k_params, v_params):
        if params.dtype != torch.float16 or params.shape != (*k.shape[:3], 2):
            raise ValueError(f"params {params.dtype} {list(params.shape)} do not fit {k.shape}")


def _check(q: Tensor, dim: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    if q.dim() != 4 or q.shape[2] != 1 or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q {q.dtype} {list(q.shape)} is not fp16 or bf16 [B, H, 1, D]")
    fits = (q.shape[0], q.shape[3]) == (k.shape[0], dim) and k.shape == v.shape
    if not fits or q.shape[1] % k.shape[1] or k.shape[2] < 1:
        raise ValueError(f"q {list(q.shape)} does not fit k {list(k.shape)}, v {list(v.shape)}")
    if dim > 256 or dim % 16:
        raise ValueError(f"head dimension {dim} is not a multiple of 16 up to 256")
    if lengths is not None and (lengths.shape != (q.shape[0],) or lengths.dtype != torch.int32):
        raise ValueError(f"lengths {lengths.dtype} {list(lengths.shape)} are not int32 [B]")
