"""Gates of attention heads: their penalties, schedule, and how they become a choice of heads.

DuoAttention (arXiv 2410.10819): one gate in [0, 1] for each layer and KV head says how much of full
attention the head keeps. The Hoyer-square penalty is SpaLoc's (arXiv 2303.05496): it pushes gates
below Q/S down and those above it up, so that the threshold comes out by itself.
"""

import math

import torch
from torch import Tensor


def hoyer_square(gates: Tensor) -> Tensor:
    """(Σ|g|)² / Σg², the effective number of active gates: N where all are equal, 1 for one. Of
    gates that are all zero it is 1, where the reference has NaN."""
    sizes = gates.abs()
    if not bool(sizes.any()):
        return sizes.sum() + 1
    # Scaled first, so that squares of small gates are not lost.
    scaled = sizes / sizes.detach().max()
    return scaled.sum().square() / scaled.square().sum()


def hoyer_threshold(gates: Tensor) -> float:
    """Q/S = Σg² / Σ|g|: the value at which the gradient of `hoyer_square` changes sign."""
    return float(gates.square().sum() / gates.abs().sum().clamp(min=1e-8))


def distillation_loss(
    full: Tensor, gated: Tensor, scored: Tensor, *, count: int | None = None
) -> Tensor:
    """Mean squared difference of final hidden states [rows, length, hidden] over the scored
    positions (bool [rows, length]), in float32.

    count  of scored positions that the mean is over, where these are only some of its rows
    """
    positions = (full[scored].float() - gated[scored].float()).square().mean(-1)
    return positions.sum() / (positions.numel() if count is None else count)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: from 0.1 to 1 in the first fifth, back in the last fifth."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def keep_full(gates: Tensor, share: float) -> Tensor:
    """Which heads stay full, bool as `gates`, where `share` of all of them is to stream.

    As the reference's quantile: of N gates the ceil(share · (N - 1)) lowest stream, all of them
    at a share of 1. The reference breaks ties by noise, here the later of equal heads stays full.
    """
    count = gates.numel()
    streaming = count if share >= 1 else max(0, math.ceil(share * (count - 1) - 1e-9))
    order = torch.argsort(gates.flatten().clamp(0, 1), stable=True)
    full = torch.ones(count, dtype=torch.bool)
    full[order[:streaming].cpu()] = False
    return full.reshape(gates.shape)


def gap_at(gates: Tensor, threshold: float) -> float:
    """Width of the gap between the gates on both sides of a threshold; 0 where all are on one."""
    values = gates.flatten()
    below, above = values[values < threshold], values[values >= threshold]
    return float(above.min() - below.max()) if len(below) and len(above) else 0.0


def full_first(full: Tensor) -> Tensor:
    """Order of the KV heads [kv_heads] in which full ones come first, each class by number."""
    return torch.argsort((~full).to(torch.uint8), stable=True)


def reorder_rows(weight: Tensor, order: Tensor, *, size: int) -> Tensor:
    """Blocks of `size` rows of a weight or bias in a new order: block i is the old order[i]."""
    blocks = weight.reshape(len(order), size, *weight.shape[1:])
    return blocks[order.to(weight.device)].reshape(weight.shape)
