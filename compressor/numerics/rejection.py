"""Rejection sampling of drafted tokens: what is emitted is distributed as the target says (vLLM's
sampler, which SparseSpec uses)."""

import torch
from torch import Tensor


def emitted_tokens(
    drafts: Tensor,
    draft_shares: Tensor,
    target_shares: Tensor,
    *,
    uniform: Tensor,
    exponential: Tensor,
    bonus: int,
) -> list[int]:
    """The drafts that are kept, and after them one token of the target's.

    drafts        [n];  draft_shares, target_shares  distributions [n, vocabulary]
    uniform       [n]: a draft is kept where target / draft reaches it, the first that is not ends
    exponential   [vocabulary], for all n: in place of a draft comes the largest of what the target
                  has over the draft's share, divided by it
    bonus         the target's token where all are kept
    """
    emitted: list[int] = []
    for place, token in enumerate(drafts.tolist()):
        draft, target = draft_shares[place, token], target_shares[place, token]
        if bool((draft <= 0) | (target / draft < uniform[place])):
            over = (target_shares[place] - draft_shares[place]).clamp(min=0)
            return [*emitted, int((over / exponential).argmax())]
        emitted.append(token)
    return [*emitted, bonus]


def kept_share(draft_shares: Tensor, target_shares: Tensor) -> Tensor:
    """How likely a draft is to be kept, [...] of distributions [..., vocabulary]."""
    return torch.minimum(draft_shares, target_shares).sum(-1)


def expected_length(kept: Tensor) -> Tensor:
    """Drafts that are kept of n in a row, on average, [...] of likelihoods [..., n]."""
    return kept.cumprod(-1).sum(-1)
