"""How far the written weights of a unit are from the original's, exact rescalings aside.

A pass may divide what makes an input by a scale and multiply what reads it. The model is the same,
its weights are not: so the scale of every fold is read off the two checkpoints, and the original is
rescaled by it before the two are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.folding import fold
from compressor.layout import Fold, Linear, UnitLayout
from compressor.qtensor import QuantSpec

COMPARABLE = 0.7
"""Above this median error the weights were moved by more than rescaling, by a rotation or an order
of channels, and say nothing one by one."""

MISFIT = 0.25
"""A row's best scale on the original differs from the stored one by a few percent; by this much
only where codes and scales do not belong together."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """One linear against the original.

    error   ‖written − original‖ / ‖original‖ (Frobenius), the original rescaled like the written
    misfit  median over groups of |best scale / stored scale − 1|; None for a float weight
    """

    linear: str
    error: float
    misfit: float | None


def layer_errors(
    unit: UnitLayout,
    *,
    written: Mapping[str, Tensor],
    original: dict[str, Tensor],
    specs: Mapping[str, QuantSpec],
) -> list[LayerError]:
    """Errors of a unit's linears.

    written, original  every weight by its full name, float32; what was rescaled takes the place of
                       the original's, since a unit in float32 is large
    specs              how linears are quantized
    """
    # What makes a linear's rows can be compared only once its columns are rescaled alike.
    for site in sorted(unit.folds, key=lambda f: f.kind != "norm"):
        original |= _rescaled(site, unit, written, original)
    return [_error(x, written, original, specs.get(x.name)) for x in unit.linears]


def _rescaled(
    site: Fold, unit: UnitLayout, after: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The original's tensors of a fold, rescaled as the written ones are.

    Taking the scale back from the written ones instead would blow up the rounding of columns that
    a dead channel made small.
    """
    name = f"{site.source}.weight"
    if name not in after or name not in before:
        return {}
    start, stop = site.rows or (0, after[name].shape[0])
    new, old = after[name][start:stop], before[name][start:stop]
    if site.kind == "norm":
        # No pass changes a norm but by a fold, so what the norm lost its readers have.
        return fold(before, site, unit, _plain((old + site.norm_offset) / (new + site.norm_offset)))
    moved = fold(before, site, unit, _plain(old.square().sum(1) / (old * new).sum(1)))
    readers = unit.site_linears(site.site)
    return moved if _distance(readers, after, moved) < _distance(readers, after, before) else {}


def _plain(ratio: Tensor) -> Tensor:
    """1 where a ratio means nothing."""
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def _distance(
    linears: tuple[Linear, ...], after: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> float:
    """Squared distance of the linears' weights, relative to their size in `before`."""
    names = [f"{linear.name}.weight" for linear in linears]
    gap = sum(float((after[name] - before[name]).square().sum()) for name in names)
    return gap / max(sum(float(before[name].square().sum()) for name in names), 1e-30)


def _error(
    linear: Linear,
    after: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    spec: QuantSpec | None,
) -> LayerError:
    name = f"{linear.name}.weight"
    new, old = after[name], before[name]
    norm = float(old.norm())
    error = float((new - old).norm()) / max(norm, 1e-30)
    if spec is None:
        return LayerError(linear=linear.name, error=error, misfit=None)
    size = spec.group_size or new.shape[1]
    groups = (new.shape[0], -1, size)
    new, old = new.reshape(groups), old.reshape(groups)
    fit = (new * old).sum(-1) / new.square().sum(-1)
    off = (fit[fit.isfinite()] - 1).abs()
    return LayerError(linear.name, error=error, misfit=float(off.median()) if off.numel() else 0.0)
