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
- Its codes may be improved by coordinate descent, and scales refitted to them, on the damped H.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor
from compressor.numerics.columns import Columns
from compressor.numerics.coordinate_descent import descend
from compressor.numerics.gram import even_diagonal, gram_error, work_dtype
from compressor.numerics.scale_refit import refit_scales
from compressor.ranks.ranks import ALONE, Ranks

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
    added    [C] float32, what was added to the diagonal
    damping  the same as a share of its mean, where an input was seen
    """

    gram: Tensor
    factor: Tensor
    order: Tensor
    added: Tensor
    damping: float

    @property
    def damped(self) -> Tensor:
        """The damped Gram matrix [C, C] float32, in the model's order."""
        return self.gram + torch.diag(self.added)


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
    gram: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    divisor: Tensor | None = None,
) -> InverseFactor | None:
    """Factor a Gram matrix [C, C], any positive multiple; None where it is not finite or zero.

    damping    share of the mean of the diagonal that is added to it; doubled until the matrix can
               be factored
    act_order  round inputs in the order of the diagonal, largest first
    divisor    [C] what the inputs have been divided by for the rounding's sake: damping is that of
               the inputs before
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
    unseen = (~seen).double() * mean
    even = even_diagonal(gram, divisor)
    damped = max(damping, 1e-8)
    for _ in range(RETRIES):
        added = unseen + damped * even
        lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(added[backwards]))
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
    return InverseFactor(
        gram=gram.float(), factor=factor, order=order, added=added.float(), damping=damped
    )


def gptq(
    weights: Sequence[Tensor],
    nearest: Sequence[QTensor],
    inverse: InverseFactor,
    *,
    lowest: int = 0,
    descent: int = 0,
    refits: int = 0,
    ranks: Ranks = ALONE,
    parts: int = 1,
) -> list[Rounded]:
    """Round weights [O_i, C] that read one input, on the grids of their nearest codes.

    nearest  of each weight: `quantize(weight, spec)`; all of one spec
    lowest   codes below it are not used (1 on a narrow symmetric grid)
    descent  sweeps of coordinate descent after GPTQ, and after each refit
    refits   times that the scales of integers are refitted to the codes
    ranks    that are given the same, and divide it
    parts    into which rows are divided at least, whatever the number of ranks: sums of products
             may have another order for other numbers of rows
    Every row's error in the Hessian's norm is at most that of its nearest codes.
    """
    codes = [torch.empty_like(q.codes) for q in nearest]
    scales = [q.scales.clone() for q in nearest]
    gram, damped = inverse.gram, inverse.damped if descent or refits else inverse.gram
    batches = list(_batches(weights, parts))

    def work(batch: Sequence[tuple[int, slice]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        rows = [(weights[i][part].float(), _rows(nearest[i], part)) for i, part in batch]
        grids = [q for _, q in rows]
        target = torch.cat([w for w, _ in rows])
        found = _split(_solve(target, grids, inverse, lowest=lowest), grids)
        found = _descended(found, target, damped, lowest=lowest, sweeps=descent)
        for _ in range(refits):
            found = [
                replace(q, scales=refit_scales(q, w, damped))
                for q, (w, _) in zip(found, rows, strict=True)
            ]
            found = _descended(found, target, damped, lowest=lowest, sweeps=descent)
        made = []
        for (i, part), (weight, q), ours in zip(batch, rows, found, strict=True):
            errors = [row_errors(x.dequantize() - weight, gram) for x in (ours, q)]
            better = errors[0] < errors[1]
            codes[i][part] = torch.where(better[:, None], ours.codes, q.codes)
            if refits:
                scales[i][part] = torch.where(better[:, None], ours.scales, q.scales)
            least = torch.where(better, errors[0], errors[1])
            # Errors avoid what counts most; this does not, and may be rounded before.
            power = gram_error(weight.to(work_dtype(gram)), gram).double()
            sums = torch.stack([*(x.double().sum() for x in (~better, least, errors[1])), power])
            made.append((codes[i][part], scales[i][part] if refits else scales[i][:0], sums))
        return made

    every = ranks.each(batches, work, lambda batch: sum(x.stop - x.start for _, x in batch))
    # Of each weight: rows kept, and the squares of our error, the nearest codes' and the output.
    totals = torch.zeros(len(weights), 4, dtype=torch.float64, device=gram.device)
    for batch, made in zip(batches, every, strict=True):
        for (i, part), (found, scale, sums) in zip(batch, made, strict=True):
            totals[i] += sums
            if ranks.world > 1:
                codes[i][part] = found
                if refits:
                    scales[i][part] = scale
    return [
        Rounded(
            q=replace(q, codes=made, scales=scale),
            kept=int(kept),
            error=error / max(power, 1e-30),
            nearest=plain / max(power, 1e-30),
        )
        for q, made, scale, (kept, error, plain, power) in zip(
            nearest, codes, scales, totals.tolist(), strict=True
        )
    ]


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """δ H δᵀ of each row of Δ [O, C], in the dtype of the Gram matrix."""
    return ((delta @ gram) * delta).sum(1)


def _descended(
    found: Sequence[QTensor], target: Tensor, damped: Tensor, *, lowest: int, sweeps: int
) -> list[QTensor]:
    """The same grids with the codes of coordinate descent towards their stacked target."""
    if not sweeps:
        return list(found)
    codes, values = (
        torch.cat(x) for x in ([q.codes for q in found], [q.dequantize() for q in found])
    )
    columns = Columns(found, lowest=lowest)
    codes, _ = descend(codes, values, target, damped, columns, sweeps=sweeps)
    return _split(codes, found)


def _split(codes: Tensor, grids: Sequence[QTensor]) -> list[QTensor]:
    """Stacked codes [O, C] on the grids of their weights."""
    parts = torch.split(codes, [q.shape[0] for q in grids])
    return [replace(q, codes=part) for q, part in zip(grids, parts, strict=True)]


def _solve(
    weight: Tensor, grids: Sequence[QTensor], inverse: InverseFactor, *, lowest: int
) -> Tensor:
    """Codes uint8 [O, C] of rows [O, C] float32, in the model's order."""
    columns = Columns(grids, lowest=lowest)
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
        if columns.fused:
            codes[start:stop], errors = columns.round_together(
                left[start:stop], local, order[start:stop]
            )
        for j in range(0 if columns.fused else stop - start):
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


def _batches(weights: Sequence[Tensor], parts: int) -> Iterator[list[tuple[int, slice]]]:
    """Row ranges (weight, rows) that are worked on together: a loop over the inputs costs the same
    for many rows as for few, until memory is the limit."""
    limit = max(1, ROOM[weights[0].device.type] // weights[0].shape[1])
    limit = min(limit, -(-sum(weight.shape[0] for weight in weights) // parts))
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
