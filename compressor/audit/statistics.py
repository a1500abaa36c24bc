"""Statistics of representations under a token, over contexts; tensors in, tensors out."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Of each token, [tokens]: as `TokenScore` says; within_std is the mean over channels of the
    standard deviation over contexts; mean [tokens, hidden]."""

    collapse: Tensor
    flatness: Tensor
    kurtosis: Tensor
    displacement: Tensor
    within_std: Tensor
    mean: Tensor


def token_statistics(states: Tensor, without: Tensor) -> TokenStatistics:
    """Statistics of representations [tokens, contexts, hidden].

    without  those of the contexts as they are [contexts, hidden]
    """
    states, without = states.double(), without.double()
    mean = states.mean(1)
    shift = (mean - without.mean(0)) / without.std(0).clamp_min(1e-12)
    centred = mean - mean.mean(1, keepdim=True)
    square = centred.square().mean(1).clamp_min(1e-300)
    magnitude = mean.abs()
    return TokenStatistics(
        collapse=_collapse(states),
        flatness=magnitude.std(1) / magnitude.mean(1).clamp_min(1e-300),
        kurtosis=centred.pow(4).mean(1) / square.square(),
        displacement=shift.square().mean(1).sqrt(),
        within_std=states.std(1).mean(1),
        mean=mean,
    )


def _collapse(states: Tensor) -> Tensor:
    """Mean cosine over pairs of contexts [tokens], from the length of the sum of unit vectors."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    count = states.shape[1]
    return (unit.sum(1).square().sum(-1) - count) / (count * (count - 1))


def cosines(vectors: Tensor) -> Tensor:
    """Cosine of each pair of rows [rows, rows]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return unit @ unit.T
