"""SmoothAttention (QoQ, arXiv 2405.04532): keys' outlier channels move into the queries.

    Q Kᵀ = (Q Λ)(K Λ⁻¹)ᵀ,   λ_i = max|K_i|^α / max|Q_i|^β
Keys are those after the rotary embedding, which turns channel i together with i + D/2 of its head:
where it is applied after the weights, both need one λ, that of the larger.
"""

import torch
from torch import Tensor


def smooth_attention_scales(
    keys: Tensor,
    *,
    alpha: float = 0.5,
    queries: Tensor | None = None,
    beta: float = 0.0,
    shared: bool = False,
) -> Tensor:
    """λ [kv_heads, D] float32: keys are divided by it, the queries that read them multiplied.

    keys     [kv_heads, D] largest magnitude of each channel after the rotary embedding
    queries  [heads, D] the same of queries, where β is not 0
    shared   one λ for all heads, as a norm that all heads share can hold
    A channel that was never seen, or whose λ is no number, keeps 1.
    """
    span = _paired(keys.float())
    scales = span**alpha
    if queries is not None and beta:
        heads = _paired(queries.float()).view(span.shape[0], -1, span.shape[1])
        scales = scales / heads.amax(1) ** beta
    if shared:
        seen = torch.where(span > 0, scales, 0)
        scales = seen.amax(0, keepdim=True).expand_as(scales)
    good = scales.isfinite() & (scales > 0)
    return torch.where(good, scales, 1.0)


def attention_candidates(grid: int) -> list[tuple[float, float]]:
    """The published pairs (α, β): none, and for each step a between 0 and 1 keys alone, (a, 0), or
    keys and queries, (a, 1 − a)."""
    steps = [i / grid for i in range(1, grid)]
    return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]


def _paired(span: Tensor) -> Tensor:
    """The larger of the two channels that the rotary embedding turns together, for both."""
    return torch.maximum(span, span.roll(span.shape[1] // 2, dims=1))
