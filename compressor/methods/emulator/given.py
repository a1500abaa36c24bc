"""Weights for the middle from a file: the published code's student.pt, or the same as
safetensors. Its keys are the number of a block of the middle, a dot, and the name inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from compressor.checkpoint.offsite import stored
from compressor.checkpoint.pickles import load_pickle
from compressor.checkpoint.safetensors import read_header, read_tensor
from compressor.checkpoint.source import Source, not_finite
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout


def numbered_tensors(path: Path, *, unpickle: bool) -> dict[str, Tensor]:
    """The tensors of a student.pt or adapter.pt, or of a safetensors file, on the CPU.

    Raises InputError for a pickle that is not asked for, or that holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return {name: read_tensor(entry) for name, entry in read_header(path).items()}
    if not unpickle:
        raise InputError(
            f"{path.name} is a pickle, which is a program",
            hint="unpickle it (unpickle: true in a recipe, --unpickle on the command line) if you "
            "trust who made it: tensors alone are loaded, in a process of its own",
        )
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        made = Path(folder) / "tensors.safetensors"
        load_pickle(path, made)
        return {name: read_tensor(entry) for name, entry in read_header(made).items()}


def under_names(
    tensors: Mapping[str, Tensor], blocks: Sequence[str], expected: Mapping[str, object], what: str
) -> dict[str, Tensor]:
    """Numbered tensors under the names of `blocks`, in order.

    expected  names → shape and dtype as files have them
    Raises InputError that names what is missing or has no place, and what has another shape.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        number, _, local = key.partition(".")
        if not number.isdigit() or int(number) >= len(blocks):
            raise InputError(
                f"{what}: {key} is of none of its {len(blocks)} blocks",
                hint="check keep and pads",
            )
        named[f"{blocks[int(number)]}.{local}"] = tensor
    lacking, beyond = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected.keys())
    if lacking or beyond:
        which, kind = (lacking, "lacks") if lacking else (beyond, "has no place for")
        raise InputError(
            f"{what}: the model {'needs' if lacking else kind} {which[0]}"
            + (f" and {len(which) - 1} more" if len(which) > 1 else "")
            + (", which the file lacks" if lacking else "")
        )
    return named


def given_middle(
    path: Path, source: Source, units: Sequence[UnitLayout], *, unpickle: bool
) -> dict[str, Tensor]:
    """The middle's weights under the names of its units, in the model's dtype."""
    entries = stored(source).entries
    inside = tuple(f"{unit.name}." for unit in units)
    expected = {n: e.spec for n, e in entries.items() if n.startswith(inside)}
    found = under_names(
        numbered_tensors(path, unpickle=unpickle), [u.name for u in units], expected, path.name
    )
    for name, spec in expected.items():
        if tuple(found[name].shape) != spec.shape:
            raise InputError(
                f"{path.name}: {name} is {list(found[name].shape)}, the model's {list(spec.shape)}",
                hint="it is of another model",
            )
    if bad := not_finite(found):
        raise InputError(f"{path.name}: {bad[0]} holds NaN or infinity")
    ready = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    return source.checkpoint.view([n for unit in units for n in unit.tensors], ready)
