"""Orders of a linear's input channels by how much they matter, for groups of like channels."""

import torch
from torch import Tensor


def salience_order(salience: Tensor, *, spread: int | None = None) -> Tensor:
    """Which channel comes at each place, int64 [..., C], for the salience of each channel [..., C].

    Ascending, so that neighbours, which share a quantization group, are alike. With `spread` = n,
    each run of n channels takes every (C/n)-th rank instead, so that all runs are alike.
    """
    order = torch.argsort(salience, dim=-1, stable=True)
    if spread is None:
        return order
    ranks = order.view(*order.shape[:-1], spread, -1)
    return ranks.transpose(-1, -2).reshape(order.shape)


def head_order(salience: Tensor, *, head_dim: int, repeat: int = 1) -> Tensor:
    """The order of the channels of each KV head, int64 [kv_heads, head_dim].

    salience  [heads · head_dim] of what attention gives out
    repeat    query heads that read one KV head, and so share its order: by the largest of theirs
    """
    heads = salience.view(-1, repeat, head_dim)
    return salience_order(heads.amax(1))
