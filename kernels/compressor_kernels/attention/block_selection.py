"""Which key blocks a query attends to, once every block has a score: forced blocks and a top-k.

The rule of InfLLM-V2 and SparDA (arXiv 2606.04511): the first `init_blocks` blocks, the query's
own block and `local_blocks` before it are always chosen, the best others fill up to `top_k`.
Quest (arXiv 2406.10774) is the rule without first and local blocks. Scores come from
`block_windows` (forecast, attention to compressed keys) or `block_pages` (bounds of pages).

Queries are the last Tq tokens of a text. Scores [B, S, Tq, blocks] fp32, S sets for each token:
one for each KV head or one for each query head. Chosen blocks [B, S, Tq, K] int32 ascending,
-1 behind the last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import pow2


@dataclass(frozen=True, slots=True)
class BlockRule:
    """How a text is cut into blocks and which of them a query gets.

    `top_k` counts forced blocks too. `own_block=False` (Quest's evaluation code) forces no block
    by its place, so it needs `init_blocks` and `local_blocks` to be 0.
    """

    block_size: int = 64
    init_blocks: int = 1
    local_blocks: int = 32
    top_k: int = 96
    own_block: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or min(self.init_blocks, self.local_blocks) < 0:
            raise ValueError(
                f"block_size {self.block_size} must be positive, init_blocks {self.init_blocks} "
                f"and local_blocks {self.local_blocks} not negative"
            )
        forced = self.init_blocks + self.local_blocks
        if not self.own_block and forced:
            raise ValueError("a rule that does not force the own block forces no other")
        if forced + 1 > self.top_k:
            raise ValueError(
                f"top_k {self.top_k} cannot hold {self.init_blocks} first blocks, "
                f"{self.local_blocks} local ones and the query's own"
            )

    def blocks(self, tokens: int) -> int:
        """Blocks of a text; the last may be shorter."""
        return -(-tokens // self.block_size)


def top_blocks(
    scores: Tensor,
    rule: BlockRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
) -> Tensor:
    """Chosen blocks of each query, int32 [B, S, Tq, min(top_k, blocks)], ascending, then -1.

    Of equal scores the lower block wins; blocks past a query are never chosen, whatever their
    score. tokens: keys in the text; lengths int32 [B]: keys of each batch row if they differ
    (tokens is then the largest); behind: tokens after the last query. Scores hold no NaN.
    """
    from compressor_kernels.attention import block_selection_jit as jit

    scores = scores.contiguous()
    batch, sets, q_len, blocks = scores.shape
    if blocks != rule.blocks(tokens):
        raise ValueError(f"scores of {blocks} blocks do not fit {tokens} tokens")
    k = min(rule.top_k, blocks)
    out = torch.empty((batch, sets, q_len, k), dtype=torch.int32, device=scores.device)
    jit.top_kernel[(batch * sets * q_len,)](
        scores,
        lengths,
        out,
        q_len,
        tokens,
        behind,
        blocks,
        sets,
        rule.init_blocks,
        rule.local_blocks if rule.own_block else -1,
        BLOCK=rule.block_size,
        K=k,
        BLOCKS_POW2=pow2(blocks),
        K_POW2=pow2(k),
        # One warp needs no barrier in its 32 counts; long rows need the registers of more.
        num_warps=1 if blocks <= 1024 else 4 if blocks <= 8192 else 8,
    )
    return out


def top_blocks_ref(
    scores: Tensor,
    rule: BlockRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
) -> Tensor:
    """`top_blocks` by stable sorts."""
    blocks = scores.shape[-1]
    k = min(rule.top_k, blocks)
    own = positions(scores, tokens=tokens, lengths=lengths, behind=behind)[1] // rule.block_size
    block = torch.arange(blocks, device=scores.device)
    forced = (block < rule.init_blocks) | (block >= own - rule.local_blocks)
    ranked = scores.masked_fill(forced, torch.inf) if rule.own_block else scores
    # Future blocks sort behind everything, also behind past blocks that hold -inf.
    order = torch.argsort(ranked, dim=-1, descending=True, stable=True)
    order = order.gather(-1, torch.argsort((order > own).to(torch.uint8), dim=-1, stable=True))
    chosen = order[..., :k].masked_fill(order[..., :k] > own, blocks).sort(-1).values
    return chosen.masked_fill(chosen == blocks, -1).to(torch.int32)


def positions(
    queries: Tensor, *, tokens: int, lengths: Tensor | None, behind: int = 0
) -> tuple[Tensor, Tensor]:
    """Text length [B, 1, 1, 1] and position of each query [B, 1, Tq, 1] of x [B, *, Tq, *]."""
    batch, _, q_len, _ = queries.shape
    if lengths is None:
        lengths = torch.full((batch,), tokens)
    length = lengths.to(queries.device, torch.int64)[:, None, None, None]
    token = torch.arange(q_len, device=queries.device)[:, None]
    return length, length - behind - q_len + token
