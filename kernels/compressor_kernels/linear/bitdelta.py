"""One-bit deltas: packing the signs of a fine-tune's difference, and multiplying with them.

BitDelta (arXiv 2402.10193) keeps a fine-tune as its base plus alpha * S, S = +-1 of the weights'
difference. Several tenants that share a base are served at once: the base product is one matrix
product over all their tokens, and `delta_matmul` adds each tenant's alpha_i * (S_i x_i).

Packed signs: int32 [ceil(I/32), O]; bit i of word [k, n] is 1 where delta[n, 32k + i] >= 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, slots=True)
class DeltaTiles:
    """Outputs for one program, tokens for one program (2, 4, 8 or 16), warps, pipeline depth."""

    block_n: int = 128
    tokens: int = 2
    num_warps: int = 4
    num_stages: int = 3


def pack_bits(bits: Tensor, *, width: int = 32) -> Tensor:
    """bool [..., I, O] to integers of `width` bits [..., ceil(I/width), O], lowest bit first.

    I is padded with zero bits. width: 8 (uint8), 16, 32 or 64 (signed).
    """
    if width not in WORD_DTYPES:
        raise ValueError(f"{width} bits are not a word; choose 8, 16, 32 or 64")
    rows = bits.shape[-2]
    words = -(-rows // width)
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, 0, 0, words * width - rows))
    split = padded.unflatten(-2, (words, width))
    packed = torch.zeros(*split.shape[:-2], split.shape[-1], dtype=torch.int64, device=bits.device)
    for i in range(width):
        packed |= split[..., i, :].to(torch.int64) << i
    return packed.to(WORD_DTYPES[width])


def unpack_bits(packed: Tensor, *, rows: int) -> Tensor:
    """Inverse of `pack_bits`: bool [..., rows, O]. Raises ValueError if the words hold fewer."""
    width = packed.element_size() * 8
    if rows > packed.shape[-2] * width:
        raise ValueError(f"{packed.shape[-2]} words of {width} bits hold no {rows} rows")
    at = torch.arange(width, dtype=packed.dtype, device=packed.device)[:, None]
    bits = (packed.unsqueeze(-2) >> at) & 1
    return bits.flatten(-3, -2)[..., :rows, :].to(torch.bool)


def pack_signs(delta: Tensor) -> Tensor:
    """Signs of delta [O, I] as int32 [ceil(I/32), O]; zero counts as positive."""
    return pack_bits((delta >= 0).mT, width=32)


def unpack_signs(signs: Tensor, *, in_features: int) -> Tensor:
    """Inverse of `pack_signs`: int8 [..., O, I] of +1 and -1."""
    return unpack_bits(signs, rows=in_features).mT.to(torch.int8) * 2 - 1


def delta_matmul(
    x: Tensor,
    signs: Tensor,
    alpha: Tensor,
    *,
    base_out: Tensor | None = None,
    tiles: DeltaTiles | None = None,
) -> Tensor:
    """y_i = base_out_i + alpha_i * (S_i x_i) for each tenant i, with gradients but for the signs.

    x [B, M, K] fp16, bf16 or fp32; signs int32 [B, ceil(K/32), N]; alpha [B]; base_out [B, M, N].
    Returns [B, M, N] in x's dtype. x enters with 22 bits below its row's largest magnitude, which
    is exact for all but vanishing inputs; sums are exact in int32 up to K = 2**18, then fp32.
    Raises ValueError on shapes that don't fit.
    """
    _check(x, signs, alpha, base_out)
    return _DeltaMatmul.apply(x, signs, alpha, base_out, tiles)


def delta_matmul_ref(
    x: Tensor, signs: Tensor, alpha: Tensor, *, base_out: Tensor | None = None
) -> Tensor:
    """`delta_matmul` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    _check(x, signs, alpha, base_out)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense = unpack_signs(signs, in_features=x.shape[-1]).to(exact)
    y = alpha.to(exact)[:, None, None] * (x.to(exact) @ dense.mT)
    return (y if base_out is None else y + base_out.to(exact)).to(x.dtype)


class _DeltaMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, signs, alpha, base_out, tiles):
        ctx.save_for_backward(x, signs, alpha)
        return _launch(x, signs, alpha, base_out, tiles)

    @staticmethod
    def backward(ctx, grad):
        x, signs, alpha = ctx.saved_tensors
        needs_x, needs_alpha = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_alpha = torch.empty_like(alpha) if needs_alpha else None
        for i in range(x.shape[0] if needs_x or needs_alpha else 0):
            # One dense sign matrix at a time. Both gradients follow from g S, which stays within
            # fp16 where S x need not.
            dense = unpack_signs(signs[i], in_features=x.shape[-1]).to(grad.dtype)
            through = grad[i] @ dense
            if grad_x is not None:
                grad_x[i] = alpha[i].to(grad.dtype) * through
            if grad_alpha is not None:
                grad_alpha[i] = (x[i].float() * through.float()).sum()
        return grad_x, None, grad_alpha, grad if ctx.needs_input_grad[3] else None, None


def _launch(
    x: Tensor, signs: Tensor, alpha: Tensor, base_out: Tensor | None, tiles: DeltaTiles | None
) -> Tensor:
    from compressor_kernels.linear import bitdelta_jit as jit

    batch, rows, inner = x.shape
    words, outer = signs.shape[1:]
    y = torch.empty((batch, rows, outer), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tiles = tiles or _tiles(batch, rows, outer)
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = -(-inner // 1024)
    token_blocks = -(-rows // tiles.tokens)
    planes = torch.empty(
        (batch, token_blocks, blocks, 8, 4 * tiles.tokens, 128), dtype=torch.int8, device=x.device
    )
    scale, total = torch.empty((2, batch, rows), dtype=torch.float32, device=x.device)
    jit.planes_kernel[(blocks, token_blocks * tiles.tokens, batch)](
        x,
        planes,
        scale,
        total,
        rows,
        x.stride(0),
        x.stride(1),
        K=inner,
        KB=blocks,
        MB=tiles.tokens,
        ROW=4096 if inner > 2048 else 2048,
        num_warps=8,
    )
    jit.delta_kernel[(-(-outer // tiles.block_n), token_blocks, batch)](
        planes,
        scale,
        total,
        signs.contiguous(),
        alpha.contiguous(),
        y if base_out is None else base_out.contiguous(),
        y,
        rows,
        N=outer,
        WORDS=words,
        KB=blocks,
        BLOCK_N=tiles.block_n,
        MB=tiles.tokens,
        APART=tiles.tokens == 2,
        HAS_BASE=base_out is not None,
        ASM=x.is_cuda,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return y


def _tiles(batch: int, rows: int, outer: int) -> DeltaTiles:
    tokens = next((t for t in (2, 4, 8) if rows <= t), 16)
    wide = batch * -(-rows // tokens) * -(-outer // 128) >= 264  # two programs for each of 132 SMs
    return DeltaTiles(block_n=128 if wide else 64, tokens=tokens)


def _check(x: Tensor, signs: Tensor, alpha: Tensor, base_out: Tensor | None) -> None:
    if x.dim() != 3 or signs.dim() != 3 or signs.dtype != torch.int32:
        raise ValueError("delta_matmul takes x [B, M, K] and int32 signs [B, ceil(K/32), N]")
    batch, rows, inner = x.shape
    if signs.shape[:2] != (batch, -(-inner // 32)):
        raise ValueError(f"signs {list(signs.shape)} do not fit x {list(x.shape)}")
    if alpha.shape != (batch,):
        raise ValueError(f"alpha {list(alpha.shape)} is not one scale for each of {batch} tenants")
    if base_out is not None and base_out.shape != (batch, rows, signs.shape[2]):
        raise ValueError(f"base_out {list(base_out.shape)} is not {[batch, rows, signs.shape[2]]}")
