"""SmoothQuant's migration (arXiv 2211.10438): a channel's scale moves its outliers from the input
of a linear into the weight.

    s_j = clamp(max|x_j|^α / max|w_j|^(1−α), 1e-5),   y = (W·s)(x/s)
over all tokens of calibration and over all rows of all linears that read the input. The published
code takes a channel that calibration never saw (max|x_j| = 0) to 1e-5, and dividing the norm's
weight by that overflows float16; here such a channel keeps its scale of 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import InputError

FLOOR = 1e-5
"""Smallest magnitude of a weight's column, and smallest scale."""

ALPHAS = {
    "opt": 0.5,
    "bloom": 0.5,
    "llama": 0.85,
    "mistral": 0.8,
    "mixtral": 0.8,
    "falcon": 0.6,
}
"""Published exponents by `model_type`. Llama's is that of Llama 2 and 3; the first had 0.8, and
70B 0.9."""

DEFAULT_ALPHA = 0.5

Quantizer = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Float weights that share an input → what their quantized forms stand for."""


def smooth_scales(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """A scale per input channel, float32 [C]: weights are multiplied by it, inputs divided.

    absmax   [C] largest |x| of each channel
    weights  [O_i, C] of everything that reads the input
    """
    act = absmax.float()
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    scales = act**alpha / columns.clamp(min=FLOOR) ** (1 - alpha)
    alive = act.isfinite() & (act > 0) & scales.isfinite()
    return torch.where(alive, scales.clamp(min=FLOOR), 1.0)


@dataclass(frozen=True, slots=True)
class Migration:
    """The outcome of a search: scales float32 [C], the exponent that made them (None: no scaling
    was best), and the relative squared output error of every candidate."""

    scales: Tensor
    ratio: float | None
    losses: tuple[float, ...]


def search_scales_with_inputs(
    weights: Sequence[Tensor],
    inputs: Tensor,
    candidates: Tensor,
    ratios: Sequence[float],
    *,
    quantizer: Quantizer,
    enter: Callable[[Tensor, Tensor], Tensor],
) -> Migration:
    """The candidate with the least Σ_i |Q_x(x/s) Q_w(W_i·s)ᵀ − x W_iᵀ|² over some inputs.

    A Gram matrix cannot judge this: what rounding does to an input depends on the token.

    weights     linears [O_i, C] that share the input
    inputs      [T, C] of that input
    candidates  [R, C] scales, made from `ratios`; no scaling is tried beside them
    quantizer   how the weights will be rounded
    enter       (x/s, s) → the quantized inputs; s for a static scale, which it changes
    Raises InputError where no candidate has a finite loss.
    """
    x = inputs.float()
    expected = [x @ weight.float().t() for weight in weights]
    size = sum(float(y.square().sum(dtype=torch.float64)) for y in expected)
    tried = torch.cat([torch.ones_like(candidates[:1]), candidates])
    losses = []
    for scales in tried:
        entering = enter(x / scales, scales)
        rounded = quantizer([weight.float() * scales for weight in weights])
        loss = sum(
            float((entering @ q.t() - y).square().sum(dtype=torch.float64))
            for q, y in zip(rounded, expected, strict=True)
        )
        losses.append(loss / max(size, 1e-30))
    finite = [i for i, loss in enumerate(losses) if loss == loss and loss != float("inf")]
    if not finite:
        raise InputError(
            "no scale candidate has a finite loss",
            hint="the calibration inputs of this block hold NaN or Inf; try dtype bfloat16",
        )
    best = min(finite, key=losses.__getitem__)
    return Migration(tried[best], None if best == 0 else ratios[best - 1], tuple(losses))
