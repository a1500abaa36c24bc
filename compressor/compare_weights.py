"""How far the written weights of a unit are from the original's, with exact rescalings undone.

A pass may divide what makes an input by a scale and multiply what reads it. The model is the same,
its weights are not: so the scale of every fold is read off the two checkpoints and taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.folding import fold
from compressor.layout import Fold, Linear, UnitLayout
from compressor.qtensor import QTensor

COMPARABLE = 0.7
"""Above this median error the weights were moved by more than rescaling, by a rotation or an order
of channels, and say nothing one by one."""

MISFIT = 0.25
"""A row's best scale on the original differs from the stored one by a few percent; by this much
only where codes and scales do not belong together."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """One linear against the original.

    error   ‖written − original‖ / ‖original‖ (Frobenius)
    misfit  median over groups of |best scale / stored scale − 1|; None for a float weight
    """

    linear: str
    error: float
    misfit: float | None


def layer_errors(
    unit: UnitLayout,
    *,
    written: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    quantized: Mapping[str, QTensor],
) -> list[LayerError]:
    """Errors of a unit's linears; both mappings hold every float weight by its full name."""
    after = {name: tensor.float() for name, tensor in written.items()}
    before = {name: tensor.float() for name, tensor in original.items()}
    # What makes a linear's rows is known only once its columns are back in place.
    for site in sorted(unit.folds, key=lambda f: f.kind != "norm"):
        after |= _undone(site, unit, after, before)
    return [_error(linear, after, before, quantized.get(linear.name)) for linear in unit.linears]


def _undone(
    site: Fold, unit: UnitLayout, after: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a fold with its scale taken back, where that explains them better."""
    name = f"{site.source}.weight"
    if name not in after or name not in before:
        return {}
    start, stop = site.rows or (0, after[name].shape[0])
    new, old = after[name][start:stop], before[name][start:stop]
    if site.kind == "norm":
        ratio = (old + site.norm_offset) / (new + site.norm_offset)
    else:
        ratio = old.square().sum(1) / (old * new).sum(1)
    good = ratio.isfinite() & (ratio > 0)
    inverse = 1 / torch.where(good, ratio, torch.ones_like(ratio))
    changed = fold(after, site, unit, inverse)
    readers = unit.site_linears(site.site)
    if _distance(readers, changed, before) < _distance(readers, after, before):
        return changed
    return {}


def _distance(
    linears: tuple[Linear, ...], weights: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> float:
    names = [f"{linear.name}.weight" for linear in linears]
    return sum(float((weights[name] - before[name]).square().sum()) for name in names)


def _error(
    linear: Linear, after: Mapping[str, Tensor], before: Mapping[str, Tensor], q: QTensor | None
) -> LayerError:
    name = f"{linear.name}.weight"
    new, old = after[name], before[name]
    norm = float(old.norm())
    error = float((new - old).norm()) / max(norm, 1e-30)
    if q is None:
        return LayerError(linear=linear.name, error=error, misfit=None)
    size = q.spec.group_size or new.shape[1]
    groups = (new.shape[0], -1, size)
    new, old = new.reshape(groups), old.reshape(groups)
    fit = (new * old).sum(-1) / new.square().sum(-1)
    off = (fit[fit.isfinite()] - 1).abs()
    return LayerError(linear.name, error=error, misfit=float(off.median()) if off.numel() else 0.0)
