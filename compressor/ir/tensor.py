"""A tensor as a header has it: its dtype and shape, without its data."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Dtype and shape of a tensor that is not there yet (or is only a header entry)."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def dtype_of_most(specs: Iterable[TensorShape]) -> torch.dtype | None:
    """The dtype of most bytes; None of no tensors."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")
