"""How far cross-attention to a subject's token stays inside the subject's region: its mean outside
less its mean inside, −1 at best, 0 where attention knows no place (FastComposer, arXiv 2305.10431).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

EPSILON = 1e-5


def resized_masks(masks: Tensor, size: int) -> Tensor:
    """Masks [rows, subjects, height, width] at a map's size, by bilinear interpolation with
    antialiasing, so fractional at borders: [rows, subjects, size, size]."""
    shape = (size, size)
    return interpolate(masks.float(), shape, mode="bilinear", antialias=True)


def localization(
    attention: Tensor, masks: Tensor, tokens: Tensor, present: Tensor, *, normalize: bool = False
) -> Tensor:
    """Outside less inside for each row and head, [rows, heads]; a row without subjects has 0.

    attention  probabilities [rows · heads, pixels, tokens] of square maps, pixel = y · size + x
    masks      of subjects, [rows, subjects, height, width]
    tokens     the token of each subject, [rows, subjects];  present  whether there is that subject
    normalize  divide a token's map by its largest value first
    """
    rows, subjects = tokens.shape
    heads, size = attention.shape[0] // rows, round(attention.shape[1] ** 0.5)
    maps = attention.view(rows, heads, size * size, -1)
    index = tokens.view(rows, 1, 1, subjects).expand(-1, heads, size * size, -1)
    maps = maps.gather(3, index).transpose(2, 3)
    if normalize:
        maps = maps / (maps.amax(dim=3, keepdim=True) + EPSILON)
    inside = resized_masks(masks, size).flatten(2).to(maps.dtype).unsqueeze(1)
    outside = 1 - inside
    shares = [(maps * m).sum(3) / (m.sum(3) + EPSILON) for m in (outside, inside)]
    counted = present.to(maps.dtype).unsqueeze(1)
    total = ((shares[0] - shares[1]) * counted).sum(2)
    return total / (counted.sum(2) + EPSILON)


def localization_loss(
    layers: Mapping[str, Tensor],
    masks: Tensor,
    tokens: Tensor,
    present: Tensor,
    *,
    normalize: bool = False,
) -> Tensor:
    """The mean over rows, heads and layers, a scalar that gradients flow from."""
    found = [
        localization(attention, masks, tokens, present, normalize=normalize).mean()
        for attention in layers.values()
    ]
    return torch.stack(found).mean()
