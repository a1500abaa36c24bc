"""Rows of suspect tokens set to the mean of the others, in a model that is edited as it is read.

A trigger of a planted backdoor acts through its row of the embedding alone. Its training goes with
the row, for good and for bad: the mean row is what a token has that the model knows nothing of.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compressor.audit.edited import EditedCheckpoint, edited_checkpoint
from compressor.audit.weights import CHUNK, row_norms
from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError


def reset_checkpoint(original: Checkpoint, rows: Mapping[str, tuple[int, ...]]) -> EditedCheckpoint:
    """The checkpoint with rows reset: table → rows of it."""
    return edited_checkpoint(
        original, {name: partial(reset_rows, rows=reset) for name, reset in rows.items()}
    )


def reset_rows(table: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of a table [ids, channels] whose `rows` are the mean of the ordinary ones: those that
    are not reset, and not zero as padding is. The mean is taken in float64.

    Raises InputError where no ordinary row is left.
    """
    kept = row_norms(table) > 0
    kept[list(rows)] = False
    if not bool(kept.any()):
        raise InputError("every row of the table of tokens is suspect or zero: nothing to reset to")
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    size = max(1, CHUNK // table.shape[1])
    for part, counted in zip(torch.split(table, size), torch.split(kept, size), strict=True):
        total += part[counted].double().sum(0)
    made = table.clone()
    made[list(rows)] = (total / int(kept.sum())).to(table.dtype)
    return made
