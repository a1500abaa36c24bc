"""What AWQ's candidates make of rows of weights, and which of them may be the best by that."""

from collections.abc import Sequence

import torch
from compressor_kernels.search.awq_candidate import candidate_delta
from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize, race
from compressor.numerics.gram import ROWS, row_errors, work_dtype
from compressor.numerics.int_affine import is_plain_int, nearest_int
from compressor.ranks.ranks import Ranks


def shortlist(
    stacks: Sequence[Tensor],
    gram: Tensor,
    candidates: Tensor,
    spec: QuantSpec,
    ranks: Ranks,
    homes: Sequence[int | None],
) -> list[int]:
    """The candidates [R, C] that rows of weights [1, O_i, C] leave, by number: on a GPU rows here
    and there, on a CPU as many parts of them as it takes, one after the other."""
    left, height = list(range(len(candidates))), sum(weight.shape[1] for weight in stacks)
    step = race.stride(height)
    if step is None:
        return left
    if gram.is_cuda:
        return race.remaining(
            losses_by_row(stacks, gram, candidates, spec, ranks, homes, step, step // 2)
        )
    looks, narrow = race.looks(height), gram.to(work_dtype(gram))
    seen = torch.zeros(len(left), 0, dtype=torch.float32, device=gram.device)
    for first in range(looks - 1):
        tried = race.chosen(candidates, left)
        made = losses_by_row(stacks, narrow, tried, spec, ranks, homes, looks, first)
        seen = torch.cat([seen, made], dim=1)
        stay = race.remaining(seen, race.careful(seen.shape[1], height))
        left, seen = [left[i] for i in stay], race.chosen(seen, stay)
        if len(left) == 1:
            break
    return left


def losses_by_row(
    stacks: Sequence[Tensor],
    gram: Tensor,
    candidates: Tensor,
    spec: QuantSpec,
    ranks: Ranks,
    homes: Sequence[int | None],
    step: int,
    first: int,
) -> Tensor:
    """Losses [R, rows] of candidates [R, C] in one of `step` rows of weights [1, O_i, C], from
    `first` on; NaN and infinity allowed."""
    apart = any(home is not None for home in homes)
    some = [weight[0, first::step] for weight in stacks]
    # In the place of what other ranks have there are zeros.
    rows = torch.cat([torch.zeros_like(w, device=gram.device) if w.is_meta else w for w in some])
    rows = rows[None]
    theirs: list[bool] = []  # rows whose errors another rank adds: of what all have, the first
    for home, weight in zip(homes, some, strict=True) if apart else ():
        theirs += [(0 if home is None else home) != ranks.rank] * len(weight)
    height, dtype = rows.shape[1], work_dtype(gram)
    room = max(1, min(step, ROWS // height))  # where all rows of one candidate lie later
    mine = candidates if apart else candidates[ranks.rank :: ranks.world]
    parts = []
    for scales in torch.split(mine, room):
        shape = len(scales), height, gram.shape[0]
        delta = torch.empty(shape, dtype=dtype, device=gram.device)
        write_deltas(rows, scales[:, None], spec, delta[:, None])
        parts.append(row_errors(delta.flatten(0, 1), gram).view(shape[:2]))
    found = torch.cat(parts) if len(parts) != 1 else parts[0]
    if apart:
        found[:, torch.tensor(theirs, device=found.device)] = 0
    elif ranks.world > 1:
        own, found = found, found.new_zeros(len(candidates), height)
        found[ranks.rank :: ranks.world] = own
    return ranks.sum(found)


def write_deltas(weight: Tensor, scales: Tensor, spec: QuantSpec, out: Tensor) -> None:
    """`_write_delta` of weights [E, O, C] for each of candidates [R, E, C]; out [R, E, O, C]."""
    if weight.is_cuda and is_plain_int(spec):
        _write_delta(weight, scales, spec, out)  # in one launch
        return
    for candidate, of_one in zip(scales, out, strict=True):
        _write_delta(weight, candidate, spec, of_one)


def _write_delta(weight: Tensor, scales: Tensor, spec: QuantSpec, out: Tensor) -> None:
    """Q(W·s)/s − W of weights [E, O, C] and a candidate [E, C], into `out`."""
    if weight.is_cuda and is_plain_int(spec):
        candidate_delta(
            weight.contiguous(),
            scales,
            bits=spec.bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            stored=spec.scale_dtype,
            out=out,
        )
        return
    weight, scales = weight.float(), scales[:, None]
    scaled = (weight * scales).flatten(0, 1)
    if is_plain_int(spec):
        rounded = nearest_int(scaled, spec, out=scaled)
    else:
        rounded = fake_quantize(scaled, spec)
    out.copy_(rounded.view(weight.shape).div_(scales).sub_(weight))
