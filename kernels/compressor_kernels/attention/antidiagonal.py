"""XAttention's estimate (arXiv 2503.16428): how much each block of queries attends to each block of
keys, from sums along antidiagonals.

Queries and keys are taken `stride` at a time, queries backwards: the product of two such pieces is
the sum of an antidiagonal of the scores, a softmax over these stands for attention, and its sums
over blocks say what a block of keys is worth. Scores are scaled by 1/(sqrt(D) * stride), as the
released code has it; Algorithm 1 is quoted with 1/sqrt(D * stride).

Layouts: q [B, H, Tq, D], the last Tq of the text, k [B, G, T, D]. Blocks lie on a grid from the
text's beginning; sums are fp32 [B, H, query blocks, key blocks], 0 for blocks of keys to come. A
row of a block of `stride` tokens counts for one, also where the text begins or ends inside it.
"""

import torch
from torch import Tensor

from compressor_kernels.triton.launch import LOG2_E, dense, pow2, score_scale


def antidiagonal_sums(
    q: Tensor, k: Tensor, *, block_size: int, stride: int, scale: float | None = None
) -> Tensor:
    """Sums of the estimated attention, fp32 [B, H, query blocks, key blocks].

    block_size: a power of two times stride. scale is 1/sqrt(D) if not given, before the stride.
    Between its two passes it holds a float for every row of `stride` queries and block of keys.
    """
    from compressor_kernels.attention import antidiagonal_jit as jit

    _check(q, k, block_size, stride)
    q, k = dense(q), dense(k)
    (batch, heads, q_len, dim), (groups, k_len) = q.shape, k.shape[1:3]
    first = (k_len - q_len) // block_size
    blocks = -(-k_len // block_size)
    rows = block_size // stride  # strided rows of a block
    lse = torch.empty(
        (batch, heads, (blocks - first) * rows, blocks), dtype=torch.float32, device=q.device
    )
    sums = torch.empty((batch, heads, blocks - first, blocks), dtype=lse.dtype, device=q.device)
    if sums.numel() == 0:
        return sums
    tile = max(128, rows)
    jit.block_lse_kernel[(-(-lse.shape[2] // tile), batch * heads)](
        q,
        k,
        lse,
        q_len,
        k_len,
        first * rows,
        lse.shape[2],
        blocks,
        heads,
        score_scale(scale, dim) / stride * LOG2_E,
        *q.stride()[:3],
        *k.stride()[:3],
        GROUP=heads // groups,
        STRIDE=stride,
        ROWS=rows,
        D=dim,
        BLOCK_D=max(16, pow2(dim)),
        TILE=tile,
        num_warps=8,
        num_stages=3,
    )
    jit.share_kernel[(blocks - first, batch * heads)](
        lse,
        sums,
        q_len,
        k_len,
        first,
        blocks,
        STRIDE=stride,
        ROWS=rows,
        BLOCK_J=128,
        num_warps=4,
    )
    return sums


def antidiagonal_sums_ref(
    q: Tensor, k: Tensor, *, block_size: int, stride: int, scale: float | None = None
) -> Tensor:
    """`antidiagonal_sums` in plain PyTorch, one head at a time."""
    _check(q, k, block_size, stride)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads, q_len, dim), (groups, k_len) = q.shape, k.shape[1:3]
    first, blocks, rows = (
        (k_len - q_len) // block_size,
        -(-k_len // block_size),
        block_size // stride,
    )
    start, end = first * block_size, blocks * block_size
    query = torch.nn.functional.pad(q, (0, 0, k_len - q_len - start, end - k_len))
    key = torch.nn.functional.pad(k, (0, 0, 0, end - k_len))
    query = query.view(batch, heads, -1, stride, dim).flip(3).flatten(3)
    key = key.view(batch, groups, -1, stride, dim).flatten(3)
    u = torch.arange(start // stride, end // stride, device=q.device)
    v = torch.arange(end // stride, device=q.device)
    unseen = (v > u[:, None]) | (v * stride >= k_len)
    row = u * stride
    real = (row < k_len) & (row + stride > k_len - q_len)
    out = torch.empty((batch, heads, blocks - first, blocks), dtype=torch.float32, device=q.device)
    for head in range(heads):
        keys = key[:, head * groups // heads].to(wide)
        scores = query[:, head].to(wide) @ keys.transpose(-1, -2)
        scores = scores * (score_scale(scale, dim) / stride)
        share = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        share = torch.where(real[:, None], share, 0)
        out[:, head] = share.view(batch, -1, rows, blocks, rows).sum((2, 4))
    return out


def covering_blocks(sums: Tensor, threshold: Tensor, *, first: int = 0) -> Tensor:
    """`covering_blocks_ref` without a sort, for sums of 0 and more in fp32."""
    from compressor_kernels.attention import antidiagonal_jit as jit

    sums = sums.contiguous()
    batch, heads, rows, blocks = sums.shape
    chosen = torch.empty(sums.shape, dtype=torch.bool, device=sums.device)
    if chosen.numel():
        jit.cover_kernel[(rows, batch * heads)](
            sums,
            threshold.to(sums.device, torch.float64),
            chosen.view(torch.uint8),
            heads,
            first,
            blocks,
            BLOCKS_POW2=pow2(blocks),
            num_warps=1 if blocks <= 512 else 4,
        )
    return chosen


def covering_blocks_ref(
    sums: Tensor, threshold: Tensor, *, first: int = 0, reference_rows: int = 0
) -> Tensor:
    """Blocks of keys that hold a share of each query block's sums, bool like `sums`.

    threshold: the share, [H]. The first block and the query's own are always there; the heaviest
    others join them until the share is reached. first: the number of the first query block.
    reference_rows: of so many query blocks, from the text's beginning, the released code chooses by
    a rule of its own, which takes about one block more: the first block is not counted as there,
    and a block joins if the share was not reached one block earlier.
    """
    blocks = sums.shape[-1]
    row = torch.arange(first, first + sums.shape[2], device=sums.device)[:, None]
    block = torch.arange(blocks, device=sums.device)
    theirs = row < reference_rows
    forced = (block == row) | ((block == 0) & ~theirs)
    wide = sums.double()
    goal = threshold.to(wide.device, wide.dtype)[:, None, None] * wide.sum(-1, keepdim=True)
    ranked = wide.masked_fill(forced | (block > row), -1.0)
    heaviest, order = ranked.sort(dim=-1, descending=True, stable=True)
    weight = heaviest.clamp(min=0)
    held = (wide * forced).sum(-1, keepdim=True) + weight.cumsum(-1) - weight
    earlier = torch.nn.functional.pad(held[..., :-1], (1, 0))  # 0 before the first: it joins
    joins = (torch.where(theirs, earlier, held) < goal) & (heaviest >= 0)
    chosen = torch.zeros_like(joins).scatter_(-1, order, joins)
    return chosen | ((forced | (block == 0)) & (block <= row))


def _check(q: Tensor, k: Tensor, block_size: int, stride: int) -> None:
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries cannot end at key {k.shape[2]}")
    rows = block_size // stride
    if rows * stride != block_size or rows != pow2(rows):
        raise ValueError(f"blocks of {block_size} are not a power of two of strides of {stride}")
