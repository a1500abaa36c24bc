"""Orders of a linear's input channels by how much they matter, for groups of like channels."""

import torch
from torch import Tensor


def salience_order(salience: Tensor) -> Tensor:
    """Which channel comes at each place, int64 [..., C], for the salience of each channel [..., C]:
    ascending, so that neighbours, which share a quantization group, are alike."""
    return torch.argsort(salience, dim=-1, stable=True)


def head_order(salience: Tensor, *, head_dim: int, repeat: int = 1) -> Tensor:
    """The order of the channels of each KV head, int64 [kv_heads, head_dim].

    salience  [heads · head_dim] of what attention gives out
    repeat    query heads that read one KV head, and so share its order: by the largest of theirs
    """
    heads = salience.view(-1, repeat, head_dim)
    return salience_order(heads.amax(1))
