"""A tensor as a header has it: its dtype and shape, without its data."""

import math
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
