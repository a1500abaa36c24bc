"""Shapes of weights that lie packed, where no map and config tell them."""

from __future__ import annotations

from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError


def packed_shape(checkpoint: Checkpoint, path: str) -> tuple[int, int]:
    """[out, in] of a linear's packed weight. Raises InputError for a form that does not tell it."""
    entries = checkpoint.entries
    if f"{path}.weight_shape" in entries:
        rows, columns = checkpoint.read([f"{path}.weight_shape"])[f"{path}.weight_shape"].tolist()
        return int(rows), int(columns)
    for leaf, codes in (("weight", 1), ("weight_packed", 2)):
        entry = entries.get(f"{path}.{leaf}")
        if entry is not None and entry.spec.dtype.itemsize == 1 and len(entry.spec.shape) == 2:
            return entry.spec.shape[0], codes * entry.spec.shape[1]
    raise InputError(
        f"{path} is packed in a form that does not tell its shape",
        hint="such a checkpoint is read with its architecture's map alone",
    )
