"""The original's weights in the form of the written ones, undone by nothing but exact symmetries.

A model is the same function when a norm's weight moves into what reads it, when the residual stream
is rotated, when KV heads or MLP channels change their order, when a key's channel is divided by
what its query is multiplied by, or when the values of a head are multiplied by a matrix whose
inverse goes into the output projection. Passes use all of these; which, and by how much, is read
off the two checkpoints, never off a record. The original is then moved in the same way, so that
what is left between the two is rounding, or damage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.ir.floats import Floats, replaced
from compressor.ir.layout import Fold, Linear, Rows, UnitLayout, weight_name
from compressor.ir.rows import change_rows, parts_of
from compressor.methods.rotate import rotated_stream
from compressor.numerics.folding import fold_changes

Tensors = dict[str, Tensor]
Weights = Mapping[str, Tensor]

Agrees = Callable[[Linear, Floats], bool]
"""Whether a linear's written weight is the one in these tensors [out, in], rounded."""

IN_PLACE = 0.9
"""Cosine of a row to the one in its place, from which it is taken to be that one: of all rows there
is no other order, but of rows that are nearly the same."""

ENOUGH = 4
"""Embedding rows for each channel from which a rotation is read."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A rotation R [n, n] of the residual stream, float32."""

    matrix: Tensor

    def right(self, x: Tensor) -> Tensor:
        """x R for x [..., n], in x's dtype."""
        return (x.to(self.matrix) @ self.matrix).to(x.dtype)

    def left(self, x: Tensor) -> Tensor:
        """Rᵀ x for x [n, m]."""
        return (self.matrix.mT @ x.to(self.matrix)).to(x.dtype)


def rotation_between(original: Tensor, written: Tensor) -> Matrix:
    """The rotation that takes rows [tokens, n] of one embedding nearest to the other's."""
    step = max(1, original.shape[0] // (ENOUGH * original.shape[1]))
    product = original[::step].double().mT @ written[::step].double()
    left, _, right = torch.linalg.svd(product)
    return Matrix((left @ right).float())


def align(
    unit: UnitLayout,
    *,
    written: Weights,
    original: Floats,
    agrees: Agrees,
    rotation: Matrix | None = None,
) -> Floats:
    """The original's tensors of a unit, moved as the written ones were: by what brings the two
    nearer. Taking a scale back from the written ones instead would blow up the rounding of columns
    that a dead channel made small.

    written, original  every weight by its full name, float32; experts' are made when they are read
    agrees             what agrees as it is needs no move of keys or values
    """
    if rotation is not None:
        original = original.replaced(rotated_stream(unit, original, rotation))
    for site in unit.folds:
        if site.kind == "norm":
            moved = _folded(original, site, unit, _norm_ratio(site, written, original))
            readers = unit.site_linears(site.site)
            # By angle, since rows may be scaled too; one scale for all columns changes no angle.
            if _cosine(readers, written, moved) > _cosine(readers, written, original) + 1e-6 or all(
                agrees(x, moved) for x in readers
            ):
                original = moved
    moves: list[Callable[[UnitLayout, Weights, Weights], Moved]] = [_head_order]
    moves += [partial(_channel_order, x) for x in unit.linears if x.role.endswith(".down")]
    for move in moves:
        touched, changed = move(unit, written, original)
        # By angle, since scales come later.
        if touched and _cosine(touched, written, changed) > _cosine(touched, written, original):
            original = original.replaced(changed)
    for site in unit.folds:
        if site.kind == "linear":
            original = _rescaled(site, unit, written, original, agrees)
    normed = any(norm.role == "norm.k" for norm in unit.norms)  # then norms are what moves
    keys = [] if normed else parts_of(unit, "attn.q", "attn.k")
    values = parts_of(unit, "attn.v", "attn.o")
    for parts, move in ((keys, _key_scales), (values, _value_maps)):
        # First, since finding a move of values takes long.
        if parts and all(agrees(x, original) for x, _ in parts):
            continue
        touched, changed = move(unit, written, original)
        after = original.replaced(changed)
        if not touched or _distance(touched, written, after) < _distance(
            touched, written, original
        ):
            original = after
    return original


def _folded(original: Floats, site: Fold, unit: UnitLayout, ratio: Tensor) -> Floats:
    """The tensors after a fold, where its ratio means something; experts' wait until they are
    read."""
    changes = fold_changes(original, site, unit, _plain(ratio))
    experts = {x.weight_name for x in unit.linears if x.expert is not None}
    at_once = {n: change(original[n]) for n, change in changes.items() if n not in experts}
    later = {n: change for n, change in changes.items() if n in experts}
    return original.replaced(at_once).changed(later)


def _cosine(linears: Sequence[Linear], written: Weights, tensors: Weights) -> float:
    """Mean cosine of the linears' rows to the written ones, summed over linears."""
    pairs = ((tensors[x.weight_name], written[x.weight_name]) for x in linears)
    return sum(float(torch.cosine_similarity(a, b, dim=1).mean()) for a, b in pairs)


def _norm_ratio(site: Fold, written: Weights, original: Weights) -> Tensor:
    """What the norm lost of its weight."""
    name = weight_name(site.source)
    return (original[name] + site.norm_offset) / (written[name] + site.norm_offset)


def _row_ratio(site: Fold, written: Weights, original: Weights) -> Tensor:
    """What the rows of a linear lost of their size."""
    name = weight_name(site.source)
    rows = site.rows or Rows("", 0, written[name].shape[0])
    new, old = rows.take(written[name]), rows.take(original[name])
    return old.square().sum(1) / (old * new).sum(1)


def _column_ratio(site: Fold, unit: UnitLayout, written: Weights, original: Weights) -> Tensor:
    """What the columns of its readers gained."""
    names = [x.weight_name for x in unit.site_linears(site.site)]
    both = sum((written[n] * original[n]).sum(0) for n in names)
    size = sum(original[n].square().sum(0) for n in names)
    if site.repeat > 1:
        heads = (-1, site.repeat, site.head_dim)
        both, size = (torch.as_tensor(x).reshape(heads).sum(1).reshape(-1) for x in (both, size))
    return torch.as_tensor(both / size)


def _rescaled(
    site: Fold,
    unit: UnitLayout,
    written: Weights,
    original: Floats,
    agrees: Agrees,
) -> Floats:
    """The tensors after a fold from a linear into its readers, where that is nearer."""
    readers = unit.site_linears(site.site)
    touched = [*readers, *(x for x in unit.linears if x.name == site.source)]
    before = _distance(readers, written, original)
    for ratio in (
        _row_ratio(site, written, original),
        # Rows that were clipped look as if they were rescaled; then the columns know better.
        _column_ratio(site, unit, written, original),
    ):
        moved = _folded(original, site, unit, ratio)
        if all(agrees(x, moved) for x in touched):
            break
    else:
        moved = _folded(original, site, unit, _row_ratio(site, written, original))
    return moved if _distance(readers, written, moved) < before else original


def _plain(ratio: Tensor) -> Tensor:
    """1 where a ratio means nothing."""
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def _distance(linears: Sequence[Linear], after: Weights, before: Weights) -> float:
    """Squared distance of the linears' weights, relative to their size in `before`."""
    names = [linear.weight_name for linear in linears]
    gap = sum(float((after[name] - before[name]).square().sum()) for name in names)
    return gap / max(sum(float(before[name].square().sum()) for name in names), 1e-30)


Moved = tuple[list[Linear], Tensors]


def _rows_of_both(
    unit: UnitLayout, written: Weights, original: Weights, role: str
) -> tuple[Tensor, Tensor] | None:
    """Rows of the weight with this role, [rows, in], as they are and as they were."""
    for linear, part in parts_of(unit, role):
        return part.take(written[linear.weight_name]), part.take(original[linear.weight_name])
    return None


def _head_order(unit: UnitLayout, written: Weights, original: Weights) -> Moved:
    """KV heads in another order, with the query heads that read them."""
    shape = unit.attention
    if shape is None or (both := _rows_of_both(unit, written, original, "attn.k")) is None:
        return [], {}
    new, old = both
    order = _matching(new.reshape(shape.kv_heads, -1), old.reshape(shape.kv_heads, -1))
    if order is None:
        return [], {}
    moved: Tensors = {}
    for role in ("attn.q", "attn.k", "attn.v"):
        for linear, part in parts_of(unit, role):

            def sort(rows: Tensor) -> Tensor:
                return rows.reshape(shape.kv_heads, -1, *rows.shape[1:])[order].reshape(rows.shape)

            moved |= change_rows(replaced(original, moved), linear, part, sort)
    touched = _touched(unit, "attn.")
    for linear in touched:
        if linear.role == "attn.o":
            old = original[linear.weight_name]
            heads = old.reshape(old.shape[0], shape.kv_heads, -1)[:, order]
            moved[linear.weight_name] = heads.reshape(old.shape)
    return touched, moved


def _key_scales(unit: UnitLayout, written: Weights, original: Weights) -> Moved:
    """Channels of keys divided by what queries are multiplied by, one for both of a rotary pair."""
    shape = unit.attention
    if shape is None or (both := _rows_of_both(unit, written, original, "attn.k")) is None:
        return [], {}
    new, old = both
    if any(norm.role == "norm.k" for norm in unit.norms):
        return _norm_scales(unit, written, original)
    pairs = (shape.kv_heads, 2, -1)
    up, down = (new * old).sum(1).reshape(pairs), old.square().sum(1).reshape(pairs)
    ratio = _plain(up.sum(1, keepdim=True) / down.sum(1, keepdim=True)).expand(pairs[0], 2, -1)
    ratio = ratio.reshape(shape.kv_heads, -1)
    repeat = shape.heads // shape.kv_heads
    scales = {"attn.k": ratio.reshape(-1), "attn.q": 1 / ratio.repeat_interleave(repeat, 0)}
    moved: Tensors = {}
    for role, by in scales.items():
        for linear, part in parts_of(unit, role):
            moved |= change_rows(replaced(original, moved), linear, part, _times(by.reshape(-1)))
    return [x for x in _touched(unit, "attn.") if x.weight_name in moved], moved


def _norm_scales(unit: UnitLayout, written: Weights, original: Weights) -> Moved:
    """The same where keys and queries are normalised: their norms take the scales."""
    norms = {norm.role: norm for norm in unit.norms}
    query, key = norms["norm.q"], norms["norm.k"]
    new, old = (x[key.weight_name] + key.offset for x in (written, original))
    pairs = (new / old).reshape(2, -1)
    ratio = _plain(pairs.prod(0).sqrt()).repeat(2)
    moved = {
        key.weight_name: old * ratio - key.offset,
        query.weight_name: (original[query.weight_name] + query.offset) / ratio - query.offset,
    }
    return [], moved


def _channel_order(down: Linear, unit: UnitLayout, written: Weights, original: Weights) -> Moved:
    """The inputs of a down projection in another order, with what makes them."""
    kind = down.role.removesuffix("down")
    sources = [
        (x, part)
        for x, part in parts_of(unit, f"{kind}up", f"{kind}gate")
        if x.expert == down.expert and part.total == down.in_features
    ]
    linear, part = sources[-1]
    name = linear.weight_name
    order = _matching(part.take(written[name]), part.take(original[name]))
    if order is None:
        return [], {}
    moved: Tensors = {}
    for linear, part in sources:
        moved |= change_rows(replaced(original, moved), linear, part, lambda r: r[order])
    moved[down.weight_name] = original[down.weight_name][:, order]
    return [*dict.fromkeys(x for x, _ in sources), down], moved


def _value_maps(unit: UnitLayout, written: Weights, original: Weights) -> Moved:
    """The values of each KV head times a matrix A, the output projection's columns times A⁻¹."""
    shape = unit.attention
    if shape is None or (both := _rows_of_both(unit, written, original, "attn.v")) is None:
        return [], {}
    new, old = both
    heads = (shape.kv_heads, shape.head_dim, -1)
    new, old = new.reshape(heads).double(), old.reshape(heads).double()
    maps = torch.linalg.lstsq(old.mT, new.mT).solution.mT
    # A map of zeros has no condition number: NaN fails the comparison too.
    # By 1-norms: singular values of many small matrices take a GPU longer than all else here.
    if not bool(maps.isfinite().all()) or not bool((torch.linalg.cond(maps, 1) <= 1e6).all()):
        return [], {}
    moved: Tensors = {}
    for linear, part in parts_of(unit, "attn.v"):

        def turn(rows: Tensor) -> Tensor:
            return torch.bmm(maps, rows.double().reshape(heads)).reshape(rows.shape)

        moved |= change_rows(original, linear, part, turn)
    touched = [x for x in _touched(unit, "attn.") if x.weight_name in moved]
    back = torch.linalg.inv(maps).repeat_interleave(shape.heads // shape.kv_heads, 0)
    for linear in unit.linears:
        if linear.role == "attn.o":
            weight = original[linear.weight_name]
            columns = weight.double().reshape(weight.shape[0], shape.heads, -1).transpose(0, 1)
            turned = (columns @ back).transpose(0, 1).reshape(weight.shape)
            moved[linear.weight_name] = turned.to(weight.dtype)
            touched.append(linear)
    return touched, moved


def _times(by: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows * by.view(-1, *[1] * (rows.dim() - 1))


def _touched(unit: UnitLayout, prefix: str) -> list[Linear]:
    return [x for x in unit.linears if x.role.startswith(prefix)]


def _matching(new: Tensor, old: Tensor) -> Tensor | None:
    """order with new[i] most like old[order[i]], by angle; None where they are in order already,
    or two are most like the same."""
    new, old = (torch.nn.functional.normalize(x, dim=1) for x in (new, old))
    if bool((new * old).sum(1).min() > IN_PLACE):
        return None  # as nearly always, which is seen at a fraction of the cost
    there = torch.arange(len(new), device=new.device)
    if new.is_cuda and bool((_most_like(new.half(), old.half()) == there).all()):
        return None  # at a tenth of the cost
    order = _most_like(new, old)
    if bool((order == there).all()) or not bool((order.sort().values == there).all()):
        return None
    return order


def _most_like(new: Tensor, old: Tensor) -> Tensor:
    """For each row of unit length the row of `old` at the smallest angle."""
    return torch.cat([(part @ old.mT).argmax(1) for part in torch.split(new, 1024)])
