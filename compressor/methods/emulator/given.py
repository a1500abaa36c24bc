"""Weights for the middle from a file of the published code, student.pt."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from compressor.checkpoint.numbered import numbered_tensors, require_alike, shapes_of, under_names
from compressor.checkpoint.offsite import stored
from compressor.checkpoint.source import Source, not_finite
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout


def given_middle(
    path: Path, source: Source, units: Sequence[UnitLayout], *, unpickle: bool
) -> dict[str, Tensor]:
    """The middle's weights under the names of its units, in the model's dtype.

    Raises InputError, or Problems with every tensor that does not fit.
    """
    entries = stored(source).entries
    inside = tuple(f"{unit.name}." for unit in units)
    expected = {n: e.spec for n, e in entries.items() if n.startswith(inside)}
    tensors = numbered_tensors(path, unpickle=unpickle)
    found = under_names(tensors, [unit.name for unit in units], what=path.name)
    require_alike(
        shapes_of(found.items()), {n: s.shape for n, s in expected.items()}, what=path.name
    )
    if bad := not_finite(found):
        raise InputError(f"{path.name}: {bad[0]} holds NaN or infinity")
    ready = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    return source.checkpoint.view([n for unit in units for n in unit.tensors], ready)
