"""A weight as the second reader sees it, in float64 on the device that it is checked on.

On a CPU numpy makes it; elsewhere codes and scales travel, an eighth of the bytes, and the device
makes it by the same operations in the same order: the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.formats.second_reader.grids import CodedWeight, Decoded
from compressor.numerics.chunks import row_chunks


def dense(decoded: Decoded | PlacedWeight, device: torch.device) -> Tensor:
    """float64 [out, in]."""
    if isinstance(decoded, CodedWeight) and device.type != "cpu":
        decoded = PlacedWeight.of(decoded, device)
    if isinstance(decoded, PlacedWeight):
        return decoded.weight
    return torch.from_numpy(decoded.weight).to(device)


@dataclass(frozen=True, slots=True)
class PlacedWeight:
    """A `CodedWeight` whose parts are on a device; what is given by output has a row for each."""

    codes: Tensor
    across: Tensor
    values: Tensor | None
    zeros: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None

    @classmethod
    def of(cls, coded: CodedWeight, device: torch.device) -> Self:
        """Copies it there."""
        here = partial(_here, device=device)
        parts = (coded.zeros, coded.scales, coded.offsets)
        each = [here(coded.by_output(part)) for part in parts]
        return cls(here(coded.codes), here(coded.across), here(coded.values), *each)

    @property
    def weight(self) -> Tensor:
        """`CodedWeight.weight`, to the last bit, by the device."""
        weight = torch.empty(self.codes.shape, dtype=torch.float64, device=self.codes.device)
        for rows in row_chunks(weight):
            out, codes = weight[rows], self.codes[rows]
            out.copy_(codes if self.values is None else self.values.take(codes.long()))
            steps = ((out.sub_, self.zeros), (out.mul_, self.scales), (out.add_, self.offsets))
            for step, part in steps:
                if part is not None:
                    step(part[rows].index_select(1, self.across))
        return weight


def _here(array: NDArray[Any] | None, *, device: torch.device) -> Any:
    if array is None:
        return None
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
