"""The grids of several weights that read one input, one input at a time."""

from collections.abc import Sequence

import torch
from compressor_kernels.search.column_rounding import round_columns
from torch import Tensor

from compressor.ir.qtensor import QTensor, decode_elements
from compressor.numerics import nearest_codes


class Columns:
    """Nearest codes of single inputs of stacked weights [O, C].

    grids   QTensors of one spec, whose rows are stacked; only their scales and zeros are read
    lowest  codes below it are not used
    """

    def __init__(self, grids: Sequence[QTensor], *, lowest: int) -> None:
        self.spec = spec = grids[0].spec
        self.lowest = lowest
        width = {"group": spec.group_size, "block": (spec.block or (0, 0))[1]}
        self.size = width.get(spec.strategy) or grids[0].shape[1]
        self.scales = _stacked(grids, [q.scales for q in grids])
        zeros = [q.zeros for q in grids if q.zeros is not None]
        self.zeros = _stacked(grids, zeros) if zeros else None
        second = [q.second for q in grids if q.second is not None]
        self.second = _stacked(grids, second)[0] if second else None
        every = torch.arange(2**spec.bits, dtype=torch.uint8, device=self.scales.device)
        self.elements = decode_elements(every, spec, torch.float32)

    def round(self, value: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest codes of one input's weights [O], and what they stand for."""
        scales = self.scales[column // self.size]
        zeros = None if self.zeros is None else self.zeros[column // self.size]
        return self.nearest(value, scales, zeros)

    def nearest(self, value: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nearest codes of values of any shape on grids of the same shape, and what they stand
        for."""
        codes = nearest_codes(value, self.spec, scales=scales, zeros=zeros, second=self.second)
        if self.lowest:
            codes.clamp_(min=self.lowest)
        values = self.elements[codes.int()]
        if zeros is None:
            values = values * scales
        elif self.spec.zero == "offset":
            values = values * scales - zeros
        else:
            values = (values - zeros) * scales
        return codes, values if self.second is None else values * self.second

    @property
    def fused(self) -> bool:
        """Whether one kernel rounds many inputs in turn: on a GPU, on integers and E2M1."""
        spec = self.spec
        plain = spec.element == "int" and self.second is None and spec.zero != "offset"
        return self.scales.is_cuda and (plain or spec.element == "fp4_e2m1")

    def round_together(
        self, left: Tensor, matrix: Tensor, positions: Tensor, *, now: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes [n, O] and errors [n, O] of some inputs, as `round_columns` has them.

        positions  [n] which inputs these are
        """
        return round_columns(
            left,
            matrix,
            (positions // self.size).int(),
            self.scales if self.second is None else self.scales * self.second,
            self.zeros,
            kind="int" if self.spec.element == "int" else "e2m1",
            bits=self.spec.bits,
            lowest=self.lowest,
            now=now,
        )


def _stacked(grids: Sequence[QTensor], values: Sequence[Tensor]) -> Tensor:
    """Per-group values of each weight as float32 [groups, all rows]."""
    rows = [v.float().expand(q.shape[0], -1) for q, v in zip(grids, values, strict=True)]
    return torch.cat(rows).t().contiguous()
