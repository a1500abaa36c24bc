"""A weight as the second reader sees it, in float64 on the device that it is checked on.

On a CPU numpy makes it; elsewhere codes and scales travel, an eighth of the bytes, and the device
makes it by the same operations in the same order: the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.formats.second_reader.grids import CodedWeight, Decoded
from compressor.numerics.chunks import row_chunks


def dense(decoded: Decoded, device: torch.device) -> Tensor:
    """float64 [out, in]."""
    if isinstance(decoded, CodedWeight) and device.type != "cpu":
        return computed(decoded, device)
    return torch.from_numpy(decoded.weight).to(device)


def computed(coded: CodedWeight, device: torch.device) -> Tensor:
    """`coded.weight`, to the last bit, by the device."""
    here = partial(_here, device=device)
    codes, across, values = here(coded.codes), here(coded.across), here(coded.values)
    parts = (coded.zeros, coded.scales, coded.offsets)
    zeros, scales, offsets = (here(coded.by_output(part)) for part in parts)
    weight = torch.empty(codes.shape, dtype=torch.float64, device=device)
    for rows in row_chunks(weight):
        out = weight[rows]
        if values is None:
            out.copy_(codes[rows])
        else:
            out.copy_(values.take(codes[rows].long()))
        if zeros is not None:
            out.sub_(zeros[rows].index_select(1, across))
        if scales is not None:
            out.mul_(scales[rows].index_select(1, across))
        if offsets is not None:
            out.add_(offsets[rows].index_select(1, across))
    return weight


def _here(array: NDArray[Any] | None, *, device: torch.device) -> Any:
    return (
        None
        if array is None
        else torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
    )
