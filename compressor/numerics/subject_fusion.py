"""FastComposer's fuse module (arXiv 2305.10431): text embeddings at the positions of subjects,
fused with what an image encoder makes of each; and when a sampler begins to use them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

EPSILON = 1e-5


def fuse(
    weights: Mapping[str, Tensor], text: Tensor, subjects: Tensor, mask: Tensor, counts: Tensor
) -> Tensor:
    """Text embeddings [rows, tokens, dim] that hold fused vectors where the mask says.

    weights   of the module, by name: mlp1, mlp2 (each layernorm, fc1, fc2) and layer_norm
    subjects  [rows, most subjects, vectors of each, dim];  counts  how many of them a row has
    mask      bool [rows, tokens]: in order of rows and tokens they take the subjects in order
    Raises ValueError where the mask has not as many positions as there are vectors.
    """
    taken = torch.arange(subjects.shape[1], device=subjects.device) < counts[:, None]
    vectors = subjects[taken].flatten(0, 1)
    if int(mask.sum()) != vectors.shape[0]:
        raise ValueError(
            f"{int(mask.sum())} positions are marked, the subjects have {vectors.shape[0]} vectors"
        )
    entering = text[mask]
    x = _mlp(weights, "mlp1", torch.cat([entering, vectors.to(text.dtype)], dim=-1)) + entering
    x = _mlp(weights, "mlp2", x) + x
    fused = text.clone()
    fused[mask] = _norm(weights, "layer_norm", x)
    return fused


def _mlp(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = _norm(weights, f"{name}.layernorm", x)
    return _linear(weights, f"{name}.fc2", gelu(_linear(weights, f"{name}.fc1", x)))


def _linear(weights: Mapping[str, Tensor], path: str, x: Tensor) -> Tensor:
    return linear(x, *_module(weights, path))


def _norm(weights: Mapping[str, Tensor], path: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], *_module(weights, path), eps=EPSILON)


def _module(weights: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    weight, bias = (weights[f"{path}.{leaf}"] for leaf in ("weight", "bias"))
    return weight, bias


def text_steps(steps: int, start: float) -> int:
    """How many of a sampler's steps use plain text embeddings: step i (from 0) does where
    i ≤ `start`, so that there is one even where it is 0."""
    return min(steps, math.floor(start) + 1) if start >= 0 else 0


def start_of(alpha: float, steps: int) -> float:
    """Where the published pipeline begins with fused embeddings: (1 − alpha) · steps in floats,
    which for 0.8 of 50 is a little less than 10."""
    return (1 - alpha) * steps
