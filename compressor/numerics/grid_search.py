"""Scales and zero points of integer grids, searched from what each input weighs.

The error of a group's weights w rounded to ŵ is Σ_c d_c·(ŵ_c − w_c)², with d the diagonal of the
Gram matrix of the inputs: the output error, if inputs did not depend on each other. The grid of the
whole range is the first candidate, so none does better. Both ends of a range shrink, on their own
where there are zero points; symmetric grids are tried with either sign of the scale; then scales
are fitted to their codes and codes to their scales in turn. Zero is in every range. A group with
zero points takes the symmetric grid that is found so where that is better.
"""

from functools import partial

import torch
from compressor_kernels.search.grid_sums import grid_sums
from compressor_kernels.search.group_dot import LARGEST
from torch import Tensor

from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics.chunks import row_chunks
from compressor.numerics.int_affine import (
    asymmetric_grid,
    check_int_spec,
    group_range,
    int_codes,
    int_grid,
    symmetric_scales,
    with_zeros,
)

RATIOS = tuple(1 - 0.05 * i for i in range(13))
"""Shares of a range with zero points, tried for each end."""
SIGNED_RATIOS = tuple(1.15 - 0.03 * i for i in range(26))
"""Shares of the largest magnitude on symmetric grids. Above 1 for the sign that puts it on the
shorter side, whose last level is less than half of all levels away."""

REFINEMENTS = 3

Grid = tuple[Tensor, Tensor | None]


def search_grid(
    weight: Tensor, diagonal: Tensor, spec: QuantSpec, *, narrow: bool = False
) -> QTensor:
    """A weight [O, C] rounded to nearest on the grids with the least error.

    diagonal  [C] of the Gram matrix, any positive multiple; or [n, C] for n weights of one shape,
              one above the other
    spec      integers, with a scale per group or output channel
    narrow    symmetric grids of positive scales whose lowest code is not used
    Raises InputError for a spec that does not fit.
    """
    check_int_spec(spec, (weight.shape[0], weight.shape[1]))
    scales, zeros = int_grid(weight, spec, narrow=narrow)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight, times=4 if weight.is_cuda else 1):
        groups = weight[rows].float().view(-1, scales.shape[1], weight.shape[1] // scales.shape[1])
        weights = diagonal.float()
        if diagonal.dim() == 2:
            every = torch.arange(rows.start, min(rows.stop, len(weight)), device=weight.device)
            weights = weights[every // (len(weight) // len(diagonal))]
        weights = weights.view(-1, *groups.shape[1:])
        search = partial(_Search, groups, weights, spec=spec, lowest=int(narrow))
        ends = group_range(weight[rows].float(), spec)
        found = search((symmetric_scales(*ends, spec, narrow=narrow), None))
        found.symmetric(*ends, narrow=narrow)
        found.refine()
        if zeros is not None:
            signed, found = found, search((scales[rows], zeros[rows]))
            found.asymmetric(*ends)
            found.refine()
            found.offer(*with_zeros(signed.scales, spec))
        scales[rows] = found.scales
        if zeros is not None:
            assert found.zeros is not None
            zeros[rows] = found.zeros
        codes[rows] = found.codes()
    return QTensor(
        spec=spec,
        codes=codes,
        scales=scales,
        zeros=None if zeros is None else zeros.to(torch.uint8),
    )


class _Search:
    """The best grids of some groups [R, n, g] so far."""

    def __init__(
        self, groups: Tensor, weights: Tensor, start: Grid, *, spec: QuantSpec, lowest: int
    ) -> None:
        self.groups, self.weights, self.spec, self.lowest = groups, weights, spec, lowest
        self.scales, self.zeros = start
        self.errors = self._errors(*start)

    def symmetric(self, low: Tensor, high: Tensor, *, narrow: bool) -> None:
        for ratio in SIGNED_RATIOS:
            scales = symmetric_scales(low * ratio, high * ratio, self.spec, narrow=narrow)
            self.offer(scales, None)
            if not narrow:
                self.offer(-scales, None)

    def asymmetric(self, low: Tensor, high: Tensor) -> None:
        low, high = low.clamp(max=0), high.clamp(min=0)
        best_low, best_high = low, high
        for end in ("both", "low", "high", "low", "high"):
            for ratio in RATIOS:
                new_low = best_low if end == "high" else low * ratio
                new_high = best_high if end == "low" else high * ratio
                (scales, zeros), _ = asymmetric_grid(new_low, new_high, self.spec)
                better = self.offer(scales, zeros)
                best_low = torch.where(better, new_low, best_low)
                best_high = torch.where(better, new_high, best_high)

    def refine(self) -> None:
        """Scales that are best for their codes, and codes that are nearest on those."""
        for _ in range(REFINEMENTS):
            if self.fused:
                _, over, square = self._sums(self.scales, self.zeros)
            else:
                steps = self._steps(self.scales, self.zeros)
                over = (steps * self.groups).mul_(self.weights).sum(-1)
                square = steps.square_().mul_(self.weights).sum(-1)
            scales = (over / square).to(self.scales.dtype)
            usable = torch.isfinite(scales) & (scales * self.scales.sign() > 0)
            self.offer(torch.where(usable, scales, self.scales), self.zeros)

    def codes(self) -> Tensor:
        """Nearest codes uint8 [R, n·g]."""
        zeros = None if self.zeros is None else self.zeros[..., None]
        found = int_codes(self.groups, self.scales[..., None], zeros, spec=self.spec)
        return found.clamp_(min=self.lowest).flatten(1)

    def offer(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Take these grids where they are better; where that is, [R, n]."""
        errors = self._errors(scales, zeros)
        better = errors < self.errors
        self.errors = torch.where(better, errors, self.errors)
        self.scales = torch.where(better, scales, self.scales)
        if zeros is not None:
            assert self.zeros is not None
            self.zeros = torch.where(better, zeros, self.zeros)
        return better

    @property
    def fused(self) -> bool:
        """Whether one kernel looks at a candidate."""
        return self.groups.is_cuda and self.groups.shape[2] <= LARGEST

    def _sums(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        found = grid_sums(
            self.groups.flatten(0, 1),
            self.weights.flatten(0, 1),
            scales.flatten(),
            None if zeros is None else zeros.flatten(),
            bits=self.spec.bits,
            lowest=self.lowest,
        )
        return found.view(3, *scales.shape)

    def _errors(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        if self.fused:
            return self._sums(scales, zeros)[0]
        values = self._steps(scales, zeros).mul_(scales.float().unsqueeze(-1))
        return values.sub_(self.groups).square_().mul_(self.weights).sum(-1)

    def _steps(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes less the zero point, float32 [R, n, g]."""
        zero = 2.0 ** (self.spec.bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
        steps = (self.groups / scales.float().unsqueeze(-1)).round_().add_(zero)
        return steps.clamp_(self.lowest, 2**self.spec.bits - 1).sub_(zero)
