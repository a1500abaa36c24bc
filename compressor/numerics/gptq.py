"""GPTQ (arXiv 2210.17323): rounding one input at a time, each time correcting what is still float.

With H = XᵀX of a linear's inputs, the output error of a weight that is off by Δ is tr(Δ H Δᵀ).
Inputs are rounded in the order of diag(H), largest first; the error of each is moved onto those
that follow it, by the Cholesky factor R of the inverse: H⁻¹ = RᵀR, R upper triangular,
    e = (w_j − q_j)/R_jj,   w_k ← w_k − e·R_jk  for all k after j.
The grid is that of rounding to nearest and stays where it is, so the order is one of processing
only and nothing of it is stored.

What differs from the published code:
- An input that calibration never saw is rounded to nearest; the published code makes it zero.
- H is factored in float64, and R is found from a factorization in reverse order, which needs no
  explicit inverse.
- The correction is greedy and can lose: a row whose error tr(δ H δᵀ) does not come out below that
  of rounding to nearest keeps the nearest codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor, decode_elements
from compressor.numerics import nearest_codes

BLOCK = 128
"""Inputs after which corrections are passed on to all later inputs in one product."""

ROOM = {"cpu": 2**24, "cuda": 2**27}
"""Weights worked on together."""

RETRIES = 40
"""How often damping is doubled before a Gram matrix is given up."""


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """What all linears that read one input share.

    gram     [C, C] float32, undamped, in the model's order
    factor   [C, C] float32 upper triangular R of the damped, reordered matrix
    order    [C] which input is rounded as the i-th
    damping  what was added to the diagonal, as a share of its mean
    """

    gram: Tensor
    factor: Tensor
    order: Tensor
    damping: float


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight's codes.

    kept     rows that keep the codes of rounding to nearest
    error    squared error of the output, relative to the output's square
    nearest  the same for rounding to nearest
    """

    q: QTensor
    kept: int
    error: float
    nearest: float


def inverse_factor(
    gram: Tensor, *, damping: float = 0.01, act_order: bool = True
) -> InverseFactor | None:
    """Factor a Gram matrix [C, C], any positive multiple; None where it is not finite or zero.

    damping    share of the mean of the diagonal that is added to it; doubled until the matrix can
               be factored
    act_order  round inputs in the order of the diagonal, largest first
    """
    diagonal = gram.diagonal().double()
    seen = diagonal > 0
    if not bool(torch.isfinite(gram).all()) or not bool(seen.any()):
        return None
    order = torch.arange(gram.shape[0], device=gram.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    # In reverse order the lower Cholesky factor becomes an upper one: with J the reversal,
    # J·H·J = L·Lᵀ gives H = (JLJ)(JLJ)ᵀ, and R = (JLJ)⁻¹.
    backwards = order.flip(0)
    matrix = gram.double()[backwards][:, backwards]
    mean = float(diagonal[seen].mean())
    unseen = (~seen)[backwards].double() * mean
    damped = max(damping, 1e-8)
    for _ in range(RETRIES):
        shifted = matrix + torch.diag(unseen + damped * mean)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed):
            break
        damped *= 2
    else:
        return None
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    factor = inverse.flip(0, 1).float().contiguous()
    if not bool(torch.isfinite(factor).all()):
        return None
    return InverseFactor(gram=gram.float(), factor=factor, order=order, damping=damped)


def gptq(
    weights: Sequence[Tensor],
    nearest: Sequence[QTensor],
    inverse: InverseFactor,
    *,
    lowest: int = 0,
) -> list[Rounded]:
    """Round weights [O_i, C] that read one input, on the grids of their nearest codes.

    nearest  of each weight: `quantize(weight, spec)`; all of one spec
    lowest   codes below it are not used (1 on a narrow symmetric grid)
    Every row's error in the Hessian's norm is at most that of its nearest codes.
    """
    codes = [torch.empty_like(q.codes) for q in nearest]
    # Of each weight: rows kept, and the squares of our error, the nearest codes' and the output.
    sums = torch.zeros(len(weights), 4, dtype=torch.float64, device=inverse.gram.device)
    for batch in _batches(weights):
        rows = [(weights[i][part].float(), _rows(nearest[i], part)) for i, part in batch]
        grids = [q for _, q in rows]
        found = _solve(torch.cat([w for w, _ in rows]), grids, inverse, lowest=lowest)
        start = 0
        for (i, part), (weight, q) in zip(batch, rows, strict=True):
            ours = replace(q, codes=found[start : start + weight.shape[0]])
            start += weight.shape[0]
            errors = [row_errors(x.dequantize() - weight, inverse.gram) for x in (ours, q)]
            better = errors[0] < errors[1]
            codes[i][part] = torch.where(better[:, None], ours.codes, q.codes)
            least = torch.where(better, errors[0], errors[1])
            power = row_errors(weight, inverse.gram)
            sums[i] += torch.stack([x.double().sum() for x in (~better, least, errors[1], power)])
    return [
        Rounded(
            q=replace(q, codes=made),
            kept=int(kept),
            error=error / max(power, 1e-30),
            nearest=plain / max(power, 1e-30),
        )
        for q, made, (kept, error, plain, power) in zip(nearest, codes, sums.tolist(), strict=True)
    ]


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """δ H δᵀ of each row of Δ [O, C], in the dtype of the Gram matrix."""
    return ((delta @ gram) * delta).sum(1)


def _solve(
    weight: Tensor, grids: Sequence[QTensor], inverse: InverseFactor, *, lowest: int
) -> Tensor:
    """Codes uint8 [O, C] of rows [O, C] float32, in the model's order."""
    columns = _Columns(grids, lowest=lowest)
    order, factor = inverse.order, inverse.factor
    count = weight.shape[1]
    # Transposed, so that one input's weights lie together.
    left = weight.t()[order].contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    places = order.tolist()
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.empty_like(left[start:stop])
        local = factor[start:stop, start:stop]
        # A division by R_jj, taken out of the loop.
        local = local / local.diagonal()[:, None]
        for j in range(stop - start):
            value = left[start + j]
            code, rounded = columns.round(value, places[start + j])
            codes[start + j] = code
            torch.sub(value, rounded, out=errors[j])
            rest = left[start + j + 1 : stop]
            rest.addr_(local[j, j + 1 :], errors[j], alpha=-1)
        if stop < count:
            scaled = errors / factor.diagonal()[start:stop, None]
            left[stop:].addmm_(factor[start:stop, stop:].t(), scaled, alpha=-1)
    out = torch.empty_like(codes)
    out[order] = codes
    return out.t()


class _Columns:
    """The grids of stacked weights, one input at a time."""

    def __init__(self, grids: Sequence[QTensor], *, lowest: int) -> None:
        self.spec = spec = grids[0].spec
        self.lowest = lowest
        width = {"group": spec.group_size, "block": (spec.block or (0, 0))[1]}
        self.size = width.get(spec.strategy) or grids[0].shape[1]
        self.scales = _stacked(grids, [q.scales for q in grids])
        zeros = [q.zeros for q in grids if q.zeros is not None]
        self.zeros = _stacked(grids, zeros) if zeros else None
        second = [q.second for q in grids if q.second is not None]
        self.second = _stacked(grids, second)[0] if second else None
        every = torch.arange(2**spec.bits, dtype=torch.uint8, device=self.scales.device)
        self.elements = decode_elements(every, spec, torch.float32)

    def round(self, value: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest codes of one input's weights [O], and what they stand for."""
        scales = self.scales[column // self.size]
        zeros = None if self.zeros is None else self.zeros[column // self.size]
        codes = nearest_codes(value, self.spec, scales=scales, zeros=zeros, second=self.second)
        if self.lowest:
            codes.clamp_(min=self.lowest)
        values = self.elements[codes.int()]
        if zeros is None:
            values = values * scales
        elif self.spec.zero == "offset":
            values = values * scales - zeros
        else:
            values = (values - zeros) * scales
        return codes, values if self.second is None else values * self.second


def _stacked(grids: Sequence[QTensor], values: Sequence[Tensor]) -> Tensor:
    """Per-group values of each weight as float32 [groups, all rows]."""
    rows = [v.float().expand(q.shape[0], -1) for q, v in zip(grids, values, strict=True)]
    return torch.cat(rows).t().contiguous()


def _batches(weights: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Row ranges (weight, rows) that are worked on together: a loop over the inputs costs the same
    for many rows as for few, until memory is the limit."""
    limit = max(1, ROOM[weights[0].device.type] // weights[0].shape[1])
    batch: list[tuple[int, slice]] = []
    free = limit
    for i, weight in enumerate(weights):
        start = 0
        while start < weight.shape[0]:
            stop = min(weight.shape[0], start + free)
            batch.append((i, slice(start, stop)))
            free -= stop - start
            start = stop
            if not free:
                yield batch
                batch, free = [], limit
    if batch:
        yield batch


def _rows(q: QTensor, rows: slice) -> QTensor:
    """Some rows of a QTensor, whose block scales are repeated for each of their rows."""
    scales, spec = q.scales, q.spec
    if spec.strategy == "block":
        assert spec.block is not None
        scales = scales.repeat_interleave(spec.block[0], 0)[: q.shape[0]]
        spec = replace(spec, block=(1, spec.block[1]))

    def part(value: Tensor | None) -> Tensor | None:
        return value if value is None or value.shape[0] == 1 else value[rows]

    found = part(scales)
    assert found is not None
    return QTensor(
        spec=spec,
        codes=q.codes[rows],
        scales=found,
        zeros=part(q.zeros),
        second=part(q.second),
    )
