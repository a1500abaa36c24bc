"""Products of int8 inputs with QoQ's 4-bit weights (arXiv 2405.04532), as QServe lays them out.

y[m, n] = row_scales[m] · (Σ_k a[m, k] W[n, k]) + bias[n], with codes q of 0 … 15 and
  progressive  W = (q · s2 + z2) · s1,  int8 s2 and z2 per group of inputs, s1 per output
  per channel  W = q · s1 − z1,         s1 and z1 per output
Tensors of one linear, all as stored:
  qweight     int8 [O, I/2]: tiles of 32 outputs by 32 inputs, 512 bytes each
  s1_scales   fp16 [O]
  s2_scales, s2_zeros  int8 [I/G, O], outputs of each 32 in the order 0, 8, 1, 9 … 7, 15, 16, 24 …
  s1_szeros   fp16 [O], z1
Codes are never unpacked to a matrix: two instructions turn four bytes of a tile into two operands
of a tensor-core product with int8. The zero points enter by the sums of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import pow2
from compressor_kernels.triton.partial_sums import reduce_parts

TILE = 32
DECODE_TOKENS = 16
PROCESSORS = 132  # multiprocessors of the device that the tiles below were chosen on


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Few tokens: outputs of a program, slices of inputs that its warps take at once, and programs
    that share a row (their sums meet in a second kernel)."""

    block_n: int = 64
    slices: int = 4
    split: int = 1
    num_stages: int = 4


@dataclass(frozen=True, slots=True)
class TiledTiles:
    """More tokens: outputs and tokens of a program."""

    block_n: int = 128
    block_m: int = 64
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True, slots=True)
class QServeWeight:
    """One weight [O, I] as the tensors above hold it."""

    qweight: Tensor
    s1_scales: Tensor
    s2_scales: Tensor | None = None
    s2_zeros: Tensor | None = None
    s1_szeros: Tensor | None = None

    def check(self) -> tuple[int, int, int]:
        """Outputs, inputs, and the group in inputs: 0 for one scale per channel. Raises ValueError
        on tensors that do not fit."""
        qweight, s2_scales, s2_zeros = self.qweight, self.s2_scales, self.s2_zeros
        if qweight.dim() != 2 or qweight.dtype != torch.int8:
            raise ValueError(f"qweight {qweight.dtype} {list(qweight.shape)} is not int8 [O, I/2]")
        outputs, inner = qweight.shape[0], qweight.shape[1] * 2
        if outputs % TILE or inner % TILE or not inner:
            raise ValueError(f"a weight [{outputs}, {inner}] is not in tiles of {TILE}")
        _check_row(outputs, s1_scales=self.s1_scales, s1_szeros=self.s1_szeros)
        if (s2_scales is None) != (s2_zeros is None) or (s2_scales is None) == (
            self.s1_szeros is None
        ):
            raise ValueError("either s2_scales and s2_zeros belong to a weight, or s1_szeros")
        if s2_scales is None:
            return outputs, inner, 0
        groups = s2_scales.shape[0]
        for tensor in (s2_scales, s2_zeros):
            if tensor.dtype != torch.int8 or tensor.shape != (groups, outputs):
                raise ValueError(f"level 2 {tensor.dtype} {list(tensor.shape)} is not int8 [G, O]")
        group = inner // groups if groups else 0
        if (group not in (32, 64) and (group % 128 or not group)) or group * groups != inner:
            raise ValueError(f"{inner} inputs in {groups} groups: of 32, 64 or a multiple of 128")
        return outputs, inner, group

    def dequantize(self) -> Tensor:
        """The dense weight in fp64, byte by byte as the layout's text says."""
        outputs, inner, group = self.check()
        n = torch.arange(outputs, device=self.qweight.device)[:, None]
        k = torch.arange(inner, device=self.qweight.device)[None, :]
        tile = n // TILE * (inner // TILE) + k // TILE
        row, column = n % TILE, k % TILE
        place = row % 8 * 64 + column // 4 % 4 * 16 + column // 16 * 8 + row // 8 % 2 * 4
        byte = self.qweight.reshape(-1).view(torch.uint8)[tile * 512 + place + column % 4]
        codes = torch.where(row >= 16, byte >> 4, byte & 15).double()
        scale = self.s1_scales.double()[:, None]
        if not group:
            return codes * scale - self.s1_szeros.double()[:, None]
        row = n[:, 0]
        stored = row // 16 * 16 + row % 8 * 2 + row // 8 % 2
        s2, z2 = (
            t.double()[:, stored].mT.repeat_interleave(group, 1)
            for t in (self.s2_scales, self.s2_zeros)
        )
        return (codes * s2 + z2) * scale

    def tile(self, rows: slice, columns: slice) -> "QServeWeight":
        """A part that starts and ends at whole tiles."""
        outputs, inner, group = self.check()
        top, bottom, _ = rows.indices(outputs)
        left, right, _ = columns.indices(inner)
        blocks = self.qweight.reshape(outputs // TILE, inner // TILE, 512)
        blocks = blocks[top // TILE : bottom // TILE, left // TILE : right // TILE]
        qweight = blocks.reshape(bottom - top, (right - left) // 2)
        if not group:
            return QServeWeight(qweight, self.s1_scales[rows], s1_szeros=self.s1_szeros[rows])
        among = slice(left // group, right // group)
        s2, z2 = (t[among, rows] for t in (self.s2_scales, self.s2_zeros))
        return QServeWeight(qweight, self.s1_scales[rows], s2, z2)


def w4a8(
    a: Tensor,
    qweight: Tensor,
    s1_scales: Tensor,
    *,
    row_scales: Tensor,
    s2_scales: Tensor | None = None,
    s2_zeros: Tensor | None = None,
    s1_szeros: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    tiles: DecodeTiles | TiledTiles | None = None,
) -> Tensor:
    """int8 a [..., I] times W: [..., O] in `out_dtype` (fp16, bf16 or fp32).

    row_scales           fp32, one for each token, or one for all
    s2_scales, s2_zeros  of progressive weights; groups of 32, 64 or a multiple of 128 inputs
    s1_szeros            of weights with one scale per channel
    Sums within a group are exact, across groups in fp32. The same inputs give the same bits.
    `tiles` names a kernel and its shape. Raises ValueError on tensors that do not fit.
    """
    weight = QServeWeight(qweight, s1_scales, s2_scales, s2_zeros, s1_szeros)
    outputs, inner, group = weight.check()
    _check_inputs(a, inner, outputs, bias)
    if out_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"products come in fp16, bf16 or fp32, not {out_dtype}")
    rows = a.reshape(-1, inner).contiguous()
    count = len(rows)
    if row_scales.numel() not in (1, count) or row_scales.dtype != torch.float32:
        raise ValueError(f"row_scales {row_scales.dtype} {list(row_scales.shape)}: {count} tokens")
    y = torch.empty((count, outputs), dtype=out_dtype, device=a.device)
    if not y.numel():
        return y.view(*a.shape[:-1], outputs)
    if tiles is None:
        tiles = decode_tiles(count, outputs, inner) if count <= DECODE_TOKENS else TiledTiles()
    if group:
        level2 = tuple(t.contiguous().view(torch.int32) for t in (s2_scales, s2_zeros))
    else:
        level2 = (None, s1_szeros.contiguous())
    tensors = (qweight.contiguous().view(torch.int32), s1_scales.contiguous(), *level2)
    launch = _decode if isinstance(tiles, DecodeTiles) else _tiled
    row_scales = row_scales.reshape(-1).contiguous()
    launch(rows, *tensors, row_scales, bias, y, group=group, tiles=tiles)
    return y.view(*a.shape[:-1], outputs)


def w4a8_ref(
    a: Tensor,
    qweight: Tensor,
    s1_scales: Tensor,
    *,
    row_scales: Tensor,
    s2_scales: Tensor | None = None,
    s2_zeros: Tensor | None = None,
    s1_szeros: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`w4a8` in plain PyTorch, computed in fp64."""
    weight = QServeWeight(qweight, s1_scales, s2_scales, s2_zeros, s1_szeros).dequantize()
    outputs, inner = weight.shape
    _check_inputs(a, inner, outputs, bias)
    y = (a.reshape(-1, inner).double() @ weight.mT) * row_scales.double().reshape(-1, 1)
    y = y if bias is None else y + bias.double()
    return y.to(out_dtype).view(*a.shape[:-1], len(weight))


def _decode(
    a: Tensor,
    words: Tensor,
    s1: Tensor,
    s2: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    group: int,
    tiles: DecodeTiles,
) -> None:
    from compressor_kernels.linear import w4a8_jit as jit

    count, inner = a.shape
    tokens = 8 if count <= 8 else 16
    out = y if tiles.split == 1 else y.new_empty((tiles.split, *y.shape), dtype=torch.float32)
    grid = (-(-count // tokens), -(-y.shape[1] // tiles.block_n), tiles.split)
    jit.decode_kernel[grid](
        a,
        words,
        s1,
        s2,
        zeros,
        row_scales,
        bias,
        out,
        count,
        y.shape[1],
        I=inner,
        G=group,
        S=_slice(group),
        ROWS=row_scales.numel() > 1,
        MB=tokens,
        BN=tiles.block_n,
        KS=tiles.slices,
        SPLIT=tiles.split,
        STAGES=tiles.num_stages,
        ASM=a.is_cuda,
        num_warps=tiles.slices,
    )
    if tiles.split > 1:
        reduce_parts(out, bias, y)


def _tiled(
    a: Tensor,
    words: Tensor,
    s1: Tensor,
    s2: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    group: int,
    tiles: TiledTiles,
) -> None:
    from compressor_kernels.linear import w4a8_jit as jit

    count, inner = a.shape
    size = _slice(group)
    slices = -(-inner // size)
    sums = a.new_empty((slices, count), dtype=torch.int32)
    jit.sums_kernel[(count,)](
        a, sums, count, I=inner, S=size, SLICES=slices, WIDTH=pow2(slices), num_warps=4
    )
    grid = (-(-count // tiles.block_m) * -(-y.shape[1] // tiles.block_n),)
    jit.tiled_kernel[grid](
        a,
        sums,
        words,
        s1,
        s2,
        zeros,
        row_scales,
        bias,
        y,
        count,
        y.shape[1],
        I=inner,
        G=group,
        S=size,
        ROWS=row_scales.numel() > 1,
        MB=tiles.block_m,
        BN=tiles.block_n,
        STAGES=tiles.num_stages,
        ASM=a.is_cuda,
        num_warps=tiles.num_warps,
    )


def _slice(group: int) -> int:
    """Inputs of a step: a whole group, or a part of one."""
    return group if group in (32, 64) else 128


def decode_tiles(count: int, outputs: int, inner: int) -> DecodeTiles:
    """Chosen from shapes alone: a row is shared only where programs are fewer than processors,
    since its sums cost a second kernel."""
    programs = -(-outputs // 64)
    split = next((s for s in (1, 2, 4) if programs * s >= 0.9 * PROCESSORS), 8)
    while split > 1 and inner // split < 1024:
        split //= 2
    return DecodeTiles(split=split)


def _check_inputs(a: Tensor, inner: int, outputs: int, bias: Tensor | None) -> None:
    if a.dim() < 1 or a.dtype != torch.int8 or a.shape[-1] != inner:
        raise ValueError(f"inputs {a.dtype} {list(a.shape)} are not int8 [..., {inner}]")
    _check_row(outputs, bias=bias)


def _check_row(outputs: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != (outputs,) or not tensor.is_floating_point()):
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} are not [{outputs}]")
