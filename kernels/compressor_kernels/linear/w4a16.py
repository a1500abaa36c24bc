"""Products with int4 weights, read as compressed-tensors `pack-quantized` lays them on disk.

y = x W^T + bias, W[o, i] = (u[o, i] - z[o, g]) * s[o, g], g the group of input i. Tensors:
  packed   weight_packed      int32 [O, ceil(I/8)], eight codes u in a word, lowest nibble first
  scales   weight_scale       fp16, bf16 or fp32 [O, I/G], or [O, 1] for one group a row
  zeros    weight_zero_point  int32 [ceil(O/8), I/G], packed along the outputs; None: z = 8

Three ways, chosen by the number of tokens: few run on a kernel that reads each weight once from
memory and keeps it in registers; more share unpacked weights in tiles; many are worth writing
the weight out dense once, for cuBLAS.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import launch_early, overlaps
from compressor_kernels.triton.partial_sums import reduce_parts

# Most tokens of each kernel; above the second the weight is written out dense.
DECODE_TOKENS = 16
TILED_TOKENS = 256
PROCESSORS = 132  # multiprocessors of the device that the tiles below were chosen on


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Few tokens: outputs of a program, slices of 128 inputs that its warps take at once, and
    programs that share a row (their sums meet in a second kernel). `apart`: what zero points of
    groups of 128 and more make is added after the last step."""

    block_n: int = 16
    slices: int = 4
    split: int = 1
    num_warps: int = 4
    num_stages: int = 4
    apart: bool = False


@dataclass(frozen=True, slots=True)
class TiledTiles:
    """More tokens: outputs and tokens of a program, and programs that share a row."""

    block_n: int = 128
    block_m: int = 64
    split: int = 1
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """One weight [O, I] as the tensors above hold it."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    group_size: int | None

    def check(self) -> tuple[int, int]:
        """Outputs, and the group in inputs (a whole row's is rounded up to slices of 128). Raises
        ValueError on tensors that do not fit."""
        packed, scales, zeros, inner = self.packed, self.scales, self.zeros, self.in_features
        if packed.dim() != 2 or packed.dtype != torch.int32 or packed.shape[1] != -(-inner // 8):
            raise ValueError(
                f"packed {packed.dtype} {list(packed.shape)} is not int32 [O, {-(-inner // 8)}]"
            )
        group = -(-inner // 128) * 128 if self.group_size is None else self.group_size
        if group < 8 or (128 % group and group % 128):
            raise ValueError(f"group size {group}: a multiple of 8 that divides 128, or of 128")
        outputs, groups = packed.shape[0], -(-inner // group)
        if scales.shape != (outputs, groups) or not scales.is_floating_point():
            raise ValueError(f"scales {list(scales.shape)} are not [{outputs}, {groups}]")
        fit = (-(-outputs // 8), groups)
        if zeros is not None and (zeros.dtype, zeros.shape) != (torch.int32, fit):
            raise ValueError(f"zeros {zeros.dtype} {list(zeros.shape)} are not int32 {list(fit)}")
        return outputs, group

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in plain PyTorch, in any float dtype."""
        outputs, _ = self.check()
        each = torch.arange(self.in_features, device=self.packed.device)
        each //= self.group_size or self.in_features
        u = _nibbles(self.packed)[:, : self.in_features]
        z = 8 if self.zeros is None else _nibbles(self.zeros.mT).mT[:outputs, each]
        return (u - z).to(dtype) * self.scales.to(dtype)[:, each]

    def tile(self, rows: slice, columns: slice) -> "Int4Weight":
        """A part that starts at whole words and whole groups."""
        top, bottom, _ = rows.indices(self.packed.shape[0])
        left, right, _ = columns.indices(self.in_features)
        size = self.group_size or self.in_features
        among = slice(left // size, -(-right // size))
        zeros = None if self.zeros is None else self.zeros[top // 8 : -(-bottom // 8), among]
        return Int4Weight(
            self.packed[top:bottom, left // 8 : -(-right // 8)],
            self.scales[top:bottom, among],
            zeros,
            right - left,
            self.group_size,
        )


def w4a16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int | None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tiles: DecodeTiles | TiledTiles | None = None,
) -> Tensor:
    """x [..., I] in fp16 or bf16 times int4 weights: [..., O] in `out_dtype`, x's if not given.

    group_size: inputs of a group: a multiple of 8 that divides 128, or a multiple of 128; None for
    one group a row. Sums are in fp32. Groups below 128, and any group where the weight is
    written out dense, round (u - z) * s to x's dtype. The same inputs give the same bits. `tiles`
    names a kernel and its shape. Raises ValueError on tensors that do not fit.
    """
    outputs, group = Int4Weight(packed, scales, zeros, x.shape[-1], group_size).check()
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"w4a16 takes x in fp16 or bf16, not {x.dtype}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} is not one value for each of {outputs} outputs")
    out_dtype = out_dtype or x.dtype
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weight = (
        packed.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
    )
    if tiles is None and len(rows) > TILED_TOKENS and out_dtype == x.dtype:
        dense = dense_weight(*weight, inner=x.shape[-1], group=group, dtype=x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(rows, dense, bias).view(*x.shape[:-1], outputs)
    y = torch.empty((len(rows), outputs), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y.view(*x.shape[:-1], outputs)
    if tiles is None:
        shape = (len(rows), outputs, x.shape[-1], group)
        few = len(rows) <= DECODE_TOKENS
        tiles = decode_tiles(*shape, zeros=zeros is not None) if few else tiled_tiles(*shape)
    launch = decode_product if isinstance(tiles, DecodeTiles) else tiled_product
    launch(rows, *weight, bias, y, group=group, tiles=tiles)
    return y.view(*x.shape[:-1], outputs)


def w4a16_ref(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int | None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`w4a16` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = Int4Weight(packed, scales, zeros, x.shape[-1], group_size)
    y = x.to(exact) @ weight.dequantize(exact).mT
    return (y if bias is None else y + bias.to(exact)).to(out_dtype or x.dtype)


def w4a16_dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    in_features: int,
    group_size: int | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The dense weight [O, I] in fp16 or bf16; the scales' dtype if not given.

    (u - z) is exact; the scale is rounded to `dtype` first, then the product.
    """
    _, group = Int4Weight(packed, scales, zeros, in_features, group_size).check()
    dtype = dtype or scales.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"w4a16_dequantize gives fp16 or bf16, not {dtype}")
    zeros = None if zeros is None else zeros.contiguous()
    return dense_weight(
        packed.contiguous(), scales.contiguous(), zeros, inner=in_features, group=group, dtype=dtype
    )


def _nibbles(words: Tensor) -> Tensor:
    """int32 [R, W] to int32 [R, 8W], lowest nibble first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).flatten(1)


def decode_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    *,
    group: int,
    tiles: DecodeTiles,
    second: Tensor | None = None,
) -> None:
    """Write x W^T into y for few tokens; `second`: NVFP4's global scale, for codes of that kind."""
    from compressor_kernels.linear import w4a16_jit as jit

    count, inner = x.shape
    outputs = packed.shape[0]
    tokens = next((t for t in (1, 2, 4, 8) if count <= t), 16)
    out = y if tiles.split == 1 else y.new_empty((tiles.split, *y.shape), dtype=torch.float32)
    early = overlaps(x)
    jit.decode_kernel[(-(-count // tokens), -(-outputs // tiles.block_n), tiles.split)](
        x,
        packed,
        scales,
        packed if zeros is None else zeros,
        second,
        y if bias is None else bias,
        out,
        count,
        outputs,
        I=inner,
        G=group,
        GROUPS=scales.shape[1],
        MB=tokens,
        BN=tiles.block_n,
        KS=tiles.slices,
        SPLIT=tiles.split,
        HAS_ZEROS=zeros is not None,
        APART=tiles.apart
        and second is None
        and group >= 128
        and (zeros is not None or x.dtype == torch.float16),
        AT=8 * tiles.num_warps if tokens == 1 else 16,
        HAS_BIAS=bias is not None,
        STAGES=tiles.num_stages,
        EARLY=early,
        ASM=x.is_cuda,
        num_warps=tiles.num_warps,
        **launch_early(early),
    )
    if tiles.split > 1:
        reduce_parts(out, bias, y)


def tiled_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    *,
    group: int,
    tiles: TiledTiles,
    second: Tensor | None = None,
) -> None:
    """`decode_product` for more tokens."""
    from compressor_kernels.linear import w4a16_jit as jit

    count, inner = x.shape
    outputs = packed.shape[0]
    slices = -(-inner // 128)
    places = x.new_empty((count, slices, 8, 16))
    sums = x.new_empty((slices, count), dtype=torch.float32)
    jit.places_kernel[(-(-slices // 8), count)](
        x, places, sums, count, I=inner, SLICES=slices, num_warps=4
    )
    out = y if tiles.split == 1 else y.new_empty((tiles.split, *y.shape), dtype=torch.float32)
    grid = (-(-count // tiles.block_m), -(-outputs // tiles.block_n), tiles.split)
    jit.tiled_kernel[grid](
        places,
        sums,
        packed,
        scales,
        packed if zeros is None else zeros,
        second,
        y if bias is None else bias,
        out,
        count,
        outputs,
        I=inner,
        G=group,
        GROUPS=scales.shape[1],
        MB=tiles.block_m,
        BN=tiles.block_n,
        SPLIT=tiles.split,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None,
        STAGES=tiles.num_stages,
        ASM=x.is_cuda,
        num_warps=tiles.num_warps,
    )
    if tiles.split > 1:
        reduce_parts(out, bias, y)


def dense_weight(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    inner: int,
    group: int,
    dtype: torch.dtype,
    second: Tensor | None = None,
) -> Tensor:
    """The weight [O, I] in `dtype`, rounded once after its scale was."""
    from compressor_kernels.linear import w4a16_jit as jit

    outputs, words = packed.shape
    dense = torch.empty((outputs, inner), dtype=dtype, device=packed.device)
    if dense.numel():
        jit.dequantize_kernel[(-(-words // 128), -(-outputs // 8))](
            packed,
            scales,
            packed if zeros is None else zeros,
            second,
            dense,
            outputs,
            I=inner,
            G=group,
            GROUPS=scales.shape[1],
            BN=8,
            COLS=128,
            HAS_ZEROS=zeros is not None,
            ASM=packed.is_cuda,
            num_warps=4,
        )
    return dense


def decode_tiles(
    count: int, outputs: int, inner: int, group: int, *, zeros: bool = False
) -> DecodeTiles:
    """Chosen from shapes alone: a row is shared where programs are too few to keep the processors
    busy, but never so far that less than two steps are left, or for one token four where every
    processor has a program. Zero points are added apart where that was faster."""
    if group == 16 and count <= 8:  # NVFP4
        return DecodeTiles(block_n=16, slices=4, num_stages=3 if count == 1 else 4)
    many = count > 8
    block_n, slices = (64, 2) if many else (32, 4)
    programs = -(-outputs // block_n)
    split = 1
    while split < 8 and programs * split < 2.5 * PROCESSORS:
        least = 4 if count == 1 and programs * split >= PROCESSORS else 2
        if inner < least * 128 * slices * 2 * split:
            break
        split *= 2
    return DecodeTiles(
        block_n=block_n,
        slices=slices,
        split=split,
        num_warps=slices,
        num_stages=2 if many and zeros else 3,
        apart=count == 1 and (zeros or split == 1),
    )


def tiled_tiles(count: int, outputs: int, inner: int, group: int) -> TiledTiles:
    """Chosen from shapes alone."""
    block_m = 32 if count <= 32 else 64
    programs = -(-outputs // 128) * -(-count // block_m)
    split = next((s for s in (1, 2, 4) if programs * s >= PROCESSORS // 2), 8)
    while split > 1 and inner // split < 1024:
        split //= 2
    return TiledTiles(block_m=block_m, split=split)
