"""Which memory blocks InfLLM (arXiv 2402.04617) reads for a piece of a text: plain PyTorch.

Tokens that leave the local window are stored in blocks. A block is represented by the mean of the
keys that local queries attended to most; a piece of the text (an execution block) chooses blocks
by the product of its mean query with those representatives, one choice for all heads.

Layouts: block keys [N, G, block, D], local scores [N, H, block], representatives [N, H * D],
queries [H, T, D], with H a multiple of G.
"""

import torch
from torch import Tensor


def represent_blocks(block_keys: Tensor, local_scores: Tensor, *, tokens: int) -> Tensor:
    """Mean of each query head's `tokens` most attended keys of a block: [N, H * D].

    block_keys [N, G, block, D] without rotation; local_scores [N, H, block]: attention that each
    key has had from queries of the local window, summed.
    """
    count, heads, block = local_scores.shape
    if block_keys.shape[0] != count or heads % block_keys.shape[1] or tokens > block:
        raise ValueError(
            f"{tokens} of keys {tuple(block_keys.shape)} by scores {tuple(local_scores.shape)}"
        )
    keys = block_keys.repeat_interleave(heads // block_keys.shape[1], dim=1)
    top = local_scores.topk(tokens, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, top).mean(2).flatten(1)


def memory_blocks(q: Tensor, representatives: Tensor, *, piece: int, top_k: int) -> Tensor:
    """Blocks of each piece of `piece` queries, int64 [pieces, min(top_k, N)], ascending.

    q [H, T, D] at the one distance that all memory is given. Of equal scores the lower block wins.
    """
    parts = torch.stack([part.mean(1).flatten() for part in q.split(piece, dim=1)])
    order = (parts @ representatives.T).argsort(dim=-1, descending=True, stable=True)
    return order[:, : min(top_k, representatives.shape[0])].sort(-1).values
