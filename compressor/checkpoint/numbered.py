"""Tensors of blocks that go by the blocks' order: student.pt and adapter.pt of Offsite-Tuning's
published code, or the same as safetensors. A key is the number of a block, a dot, and the name in
it."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from compressor.checkpoint.pickles import load_pickle
from compressor.checkpoint.safetensors import read_header, read_tensor
from compressor.errors import CompressError, InputError, Problems, several

SHOWN = 4
"""Names that an error lists."""


def numbered_tensors(path: Path, *, unpickle: bool) -> dict[str, Tensor]:
    """The tensors of such a file, on the CPU.

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
    tensors: Mapping[str, Tensor], blocks: Sequence[str], *, what: str
) -> dict[str, Tensor]:
    """Numbered tensors under the names of `blocks`, in order. Raises InputError for a key that is
    of none of them."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        number, _, local = key.partition(".")
        if not number.isdigit() or int(number) >= len(blocks):
            raise InputError(
                f"{what}: {key} is of none of its {len(blocks)} blocks",
                hint="does it hold as many blocks as keep, or as both pads together, say?",
            )
        named[f"{blocks[int(number)]}.{local}"] = tensor
    return named


def require_alike(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Raises Problems with every tensor that is missing, has no place, or has another shape."""
    problems: list[CompressError] = []
    for said, names in (
        ("lacks", sorted(expected.keys() - found)),
        ("holds what the model has no place for:", sorted(found.keys() - expected)),
    ):
        if names:
            problems.append(InputError(f"{what} {said} {several(names, SHOWN)}"))
    problems += [
        InputError(f"{what}: {name} is {list(found[name])}, the model's {list(shape)}")
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise Problems(problems)


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors}
