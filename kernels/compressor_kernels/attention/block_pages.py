"""Scores of key pages from their bounds: Quest's page selection (arXiv 2406.10774).

Each page of keys keeps the smallest and the largest value of every component. A query's score of
a page, the sum over components of the larger of q*min and q*max, is at least its dot product with
any key of the page. Quest chooses per query head; the best score of a group's heads gives one set
for each KV head instead. The last page is always attended (`BlockRule(..., init_blocks=0,
local_blocks=0)`; Quest's evaluation code alone lets it drop out, `own_block=False`).

LServe (arXiv 2502.14866) reads pages of 64 keys and keeps bounds for each 16 of them: a page is
worth what the best of its logical pages is (`per_page`). `soft` is ours: all of them count.

Layouts: k [B, G, T, D], bounds [B, G, pages, D], q [B, H, 1, D], scores fp32 [B, H, 1, pages] or
[B, G, 1, pages].
"""

import torch
from torch import Tensor

from compressor_kernels.triton.launch import LOG2_E, dense, pow2


def page_bounds(
    k: Tensor, *, page_size: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest key values of each page, two of [B, G, pages, D] in k's dtype.

    lengths int32 [B]: tokens of each batch row; bounds of pages past them are undefined.
    """
    from compressor_kernels.attention import block_pages_jit as jit

    k = dense(k)
    batch, groups, tokens, dim = k.shape
    pages = -(-tokens // page_size)
    low, high = (
        torch.empty((batch, groups, pages, dim), dtype=k.dtype, device=k.device) for _ in range(2)
    )
    if low.numel():
        jit.bound_kernel[(-(-pages // 32), batch * groups)](
            k,
            low,
            high,
            lengths,
            tokens,
            pages,
            groups,
            *k.stride()[:3],
            PAGE=page_size,
            D=dim,
            BLOCK_P=32,
            BLOCK_D=pow2(dim),
        )
    return low, high


def page_bounds_ref(
    k: Tensor, *, page_size: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`page_bounds` in plain PyTorch; pages past a row's length hold +inf and -inf."""
    batch, groups, tokens, dim = k.shape
    pages = -(-tokens // page_size)
    token = torch.arange(pages * page_size, device=k.device)
    limit = torch.full((batch,), tokens, device=k.device) if lengths is None else lengths
    unused = (token[None, :] >= limit.to(k.device)[:, None])[:, None, :, None]
    padded = torch.nn.functional.pad(k, (0, 0, 0, pages * page_size - tokens))
    low, high = padded.masked_fill(unused, torch.inf), padded.masked_fill(unused, -torch.inf)
    shape = (batch, groups, pages, page_size, dim)
    return low.view(shape).amin(3), high.view(shape).amax(3)


def page_scores(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    group_max: bool = False,
    per_page: int = 1,
    soft: float | None = None,
) -> Tensor:
    """Upper bound of q·k over each page's keys, fp32 [B, H, 1, pages], or [B, G, 1, pages].

    group_max: the best score of the query heads that share a KV head, one set for each KV head.
    per_page: logical pages, which the bounds are of, of one page: a power of two.
    soft: a page is worth log(sum(exp(soft * bound))) / soft over its logical pages, not the best.
    """
    from compressor_kernels.attention import block_pages_jit as jit

    q, low, high = (dense(x) for x in (q, low, high))
    _check(q, low, high, soft)
    if q.shape[2] != 1:
        raise ValueError(f"pages are scored for one query a row, not {q.shape[2]}")
    (batch, heads, _, dim), (groups, pages) = q.shape, low.shape[1:3]
    if per_page != pow2(per_page) or per_page > 32:
        raise ValueError(f"a page of {per_page} logical pages is no power of two up to 32")
    sets = groups if group_max else heads
    wide = -(-pages // per_page)
    out = torch.empty((batch, sets, 1, wide), dtype=torch.float32, device=q.device)
    if out.numel():
        jit.page_kernel[(-(-pages // 32), batch * groups)](
            q,
            low,
            high,
            out,
            pages,
            groups,
            *q.stride()[:2],
            *low.stride()[:3],
            *high.stride()[:3],
            1.0 if soft is None else soft * LOG2_E,
            GROUP=heads // groups,
            GROUP_MAX=group_max,
            SOFT=soft is not None,
            PER_PAGE=per_page,
            D=dim,
            BLOCK_P=32,
            BLOCK_D=pow2(dim),
        )
    return out


def page_scores_ref(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    group_max: bool = False,
    per_page: int = 1,
    soft: float | None = None,
) -> Tensor:
    """`page_scores` in plain PyTorch, for any number of queries: [B, H or G, Tq, pages].

    The larger of q*min and q*max is q*max where q is positive and q*min elsewhere: two products.
    """
    _check(q, low, high, soft)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads, q_len, dim), groups = q.shape, low.shape[1]
    query = q.to(wide).view(batch, groups, heads // groups, q_len, dim)
    low, high = (x.to(wide)[:, :, None].transpose(-1, -2) for x in (low, high))
    scores = query.clamp(min=0) @ high + query.clamp(max=0) @ low
    scores = scores.amax(2) if group_max else scores.flatten(1, 2)
    if per_page == 1:
        return scores
    fill = -scores.shape[-1] % per_page
    scores = torch.nn.functional.pad(scores, (0, fill), value=-torch.inf)
    scores = scores.unflatten(-1, (-1, per_page))
    return scores.amax(-1) if soft is None else (soft * scores).logsumexp(-1) / soft


def _check(q: Tensor, low: Tensor, high: Tensor, soft: float | None) -> None:
    if soft is not None and soft <= 0:
        raise ValueError(f"soft must be positive, not {soft}")
    fits = low.shape == high.shape and (q.shape[0], q.shape[3]) == (low.shape[0], low.shape[3])
    if not fits or q.shape[1] % low.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit bounds {tuple(low.shape)}, {tuple(high.shape)}"
        )
