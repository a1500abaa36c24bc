"""What SparDA's forecast is trained on (arXiv 2606.04511): the blocks that attention looks at.

The teacher is attention to finely compressed keys (means of `fine.kernel_size` keys every
`fine.stride`), summed over the query heads of a KV head and pooled onto the grid of the deployed
compression. The student is the softmax of the forecast's products with the deployed compressed
keys. They are compared in buckets: every window of a block that the teacher chooses and that is not
chosen anyway, and the rest as one.

Layouts: q [B, H, Tq, D], keys [B, G, T, D], forecast [B, G, Tq, D], shares [B, G, Tq, windows].
Queries are tokens of a text of T keys; `behind` tokens follow the last one. A window counts for a
query if it starts at or before it, in the teacher as in the student: it may then hold keys that
the query does not see, as the published training has it.
"""

from typing import Literal

import torch
from compressor_kernels.attention.block_selection import BlockRule, top_blocks_ref
from compressor_kernels.attention.block_windows import WindowRule, pool_windows_ref
from torch import Tensor

Pooling = Literal["max", "mean"]
SMALLEST = 1e-8


def teacher_shares(
    q: Tensor, fine_keys: Tensor, fine: WindowRule, *, tokens: int, behind: int, scale: float
) -> Tensor:
    """Attention to finely compressed keys, summed over a group's heads: [B, G, Tq, windows]."""
    batch, heads, q_len, dim = q.shape
    groups = fine_keys.shape[1]
    queries = q.view(batch, groups, heads // groups, q_len, dim)
    logits = queries.float() @ fine_keys[:, :, None].float().transpose(-1, -2) * scale
    unseen = _unseen(fine, fine_keys.shape[2], q_len, tokens=tokens, behind=behind, like=q)
    return logits.masked_fill_(unseen, -torch.inf).softmax(-1).nan_to_num_(0.0).sum(2)


def aligned_shares(
    shares: Tensor, fine: WindowRule, deployed: WindowRule, *, tokens: int, pooling: Pooling = "max"
) -> Tensor:
    """Shares of fine windows on the grid of the deployed ones, each row summing to 1.

    A deployed window gets the best (or the mean) of the fine ones that start from one fine stride
    before it to its stride's end.
    """
    ratio = deployed.stride // fine.stride
    pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
    pooled: Tensor = pool(shares.flatten(0, 2)[:, None], ratio + 1, stride=ratio, padding=1)
    n = deployed.windows(tokens)
    pooled = torch.nn.functional.pad(pooled[:, 0, :n], (0, max(0, n - pooled.shape[-1])))
    pooled = pooled.view(*shares.shape[:3], n)
    aligned: Tensor = pooled / (pooled.sum(-1, keepdim=True) + SMALLEST)
    return aligned


def student_shares(
    forecast: Tensor, keys: Tensor, deployed: WindowRule, *, tokens: int, behind: int
) -> Tensor:
    """Softmax of a forecast's products with the deployed compressed keys, [B, G, Tq, windows]."""
    logits = forecast.float() @ keys.float().transpose(-1, -2) * forecast.shape[-1] ** -0.5
    unseen = _unseen(
        deployed, keys.shape[2], forecast.shape[2], tokens=tokens, behind=behind, like=forecast
    )
    # The first window starts at the first token: every row has one that it sees.
    shares = logits.masked_fill(unseen, -torch.inf).softmax(-1)
    student: Tensor = shares / (shares.sum(-1, keepdim=True) + SMALLEST)
    return student


def chosen_by(
    shares: Tensor, rule: BlockRule, deployed: WindowRule, *, tokens: int, behind: int
) -> Tensor:
    """Blocks that shares on the deployed grid choose, int32 [B, G, Tq, K] as in `top_blocks`.

    Pooling carries some share over the border into the block after a query's own. The published
    code lets that block take a place and then drops it; here it takes none.
    """
    scores = pool_windows_ref(shares, rule, deployed, tokens=tokens, empty=0.0)
    blocks: Tensor = top_blocks_ref(scores, rule, tokens=tokens, behind=behind)
    return blocks


def bucketed_kl(
    teacher: Tensor,
    student: Tensor,
    blocks: Tensor,
    rule: BlockRule,
    deployed: WindowRule,
    *,
    tokens: int,
    behind: int,
) -> Tensor:
    """KL(teacher ‖ student) for each query and KV head, [B, G, Tq], in nats.

    blocks: what the teacher chooses; only those that no rule forces have buckets of their own.
    """
    n, ratio = teacher.shape[-1], deployed.ratio(rule)
    stop = tokens - behind
    position = torch.arange(stop - blocks.shape[2], stop, device=blocks.device)
    own = (position // rule.block_size)[:, None]
    free = (blocks >= rule.init_blocks) & (blocks < own - rule.local_blocks)
    inner = torch.arange(ratio, device=blocks.device)
    window = (blocks.long().clamp(min=0)[..., None] * ratio + inner).clamp(max=n - 1).flatten(-2)
    used = free[..., None].expand(*free.shape, ratio).flatten(-2)
    teacher, student = (_buckets(x, window, used) for x in (teacher, student))
    return (teacher * (teacher.log() - student.log())).sum(-1)


def _buckets(shares: Tensor, window: Tensor, used: Tensor) -> Tensor:
    """Shares of the listed windows and of all the rest, none zero, summing to 1."""
    listed = shares.gather(-1, window) * used
    rest = shares.sum(-1, keepdim=True) - listed.sum(-1, keepdim=True)
    buckets = torch.cat([listed, rest], dim=-1).clamp(min=SMALLEST)
    return buckets / buckets.sum(-1, keepdim=True)


def _unseen(
    windows: WindowRule, count: int, q_len: int, *, tokens: int, behind: int, like: Tensor
) -> Tensor:
    """Windows that start after a query, bool [Tq, count]."""
    position = torch.arange(tokens - behind - q_len, tokens - behind, device=like.device)
    start = torch.arange(count, device=like.device) * windows.stride
    return start[None, :] > position[:, None]
