"""A block that runs with gradients, the rows that enter it, and what the original makes of its own.

What is learned of a block by gradients needs two things of it: the error of its outputs under
candidate weights, and the gradient of that. Names in memory, stacks of experts, the dtype in which
blocks run, batches that fit the device and the graph of a step on a GPU stay here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.ir.layout import weight_name
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.numerics.processor import multiplies_bfloat16
from compressor.runner.block_runner import Block
from compressor.runner.execution import Execution
from compressor.runner.pieces import Part, Piece, Pieces, pieces_of
from compressor.runner.recorded import Recorded
from compressor.runner.simulate import StoredInput, quantized_inputs
from compressor.runner.stream import Stream

TOKENS = 1024
"""Tokens of a piece that runs with gradients, or one row: of a large block more keep no GPU
busier."""
WORK = 2**37
"""Weights times tokens that keep one busy: pieces of small blocks are larger, since there each
launch counts. By the block alone, so that sums have one order wherever they are made."""


class TunableBlock:
    """A block of a unit as it stands, on its calibration rows.

    inputs   rows that enter it;  targets  what is to leave it for them
    schemes  module path → how its inputs are quantized as the model runs, those of experts aside;
             rounding them passes gradients on as if it were not there
    execution  whose ranks have all rows here, and run some pieces each
    The last token of a row counts for nothing, as in AutoRound: no later one sees it.
    """

    def __init__(
        self,
        block: Block,
        unit: Unit,
        *,
        inputs: Stream,
        targets: Stream,
        execution: Execution,
        schemes: Mapping[str, Scheme] | None = None,
    ) -> None:
        self._block, self._inputs, self._targets = block, inputs, targets
        device, dtype = block.runner.device, block.runner.dtype
        self._execution, self._running = execution, Pieces(execution.ranks, device)
        self._rounded = {
            x.name: StraightInput(scheme.input, unit.input_scales.get(x.name))
            for x in unit.layout.linears
            if (scheme := (schemes or {}).get(x.name)) and scheme.input and x.expert is None
        }
        self._tensors = {n: t.to(device, dtype) for n, t in unit.dequantized(dtype).items()}
        # How many tokens an expert is sent differs, and so do shapes.
        self._alike = all(linear.expert is None for linear in unit.layout.linears)
        self._leaves: dict[str, Tensor] = {}
        self._places: dict[tuple[int, int], _Place] = {}

    @property
    def dtype(self) -> torch.dtype:
        """In which the block runs."""
        return self._block.runner.dtype

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._inputs.rows

    @property
    def repeatable(self) -> bool:
        """Whether all that ran has kernels whose sums have one order."""
        return self._running.repeatable

    @property
    def replays(self) -> bool:
        """Whether the pieces of a step are graphs by now."""
        return any(place.recorded.replays for place in self._places.values())

    def loss(self, weights: Mapping[str, Tensor], rows: Sequence[int]) -> float:
        """Mean squared error of what leaves the block for these rows.

        weights  module path → [out, in], in place of those of the unit
        Raises Interrupted when asked to stop.
        """
        self._execution.check_stop()

        def attempt(batch: int) -> float:
            (loss,) = self._running.losses(pieces_of(rows, batch), partial(self._error_of, weights))
            return loss

        return self._execution.halving(attempt) / self._size(rows)

    def loss_and_gradients(
        self, weights: Mapping[str, Tensor], rows: Sequence[int], owners: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        """`loss`, and its gradient [out, in] for each of the weights that are this rank's; the same
        on every run of one machine. CPUs that multiply bfloat16 faster do so here, as GPUs do.

        owners  the rank of each weight
        """
        self._execution.check_stop()
        size = self._size(rows)
        count = sum(weight.numel() for weight in weights.values())
        most = max(1, max(TOKENS, WORK // max(count, 1)) // self._targets.hidden.shape[1])

        def attempt(batch: int) -> tuple[float, list[Tensor]]:
            leaves = self._placed(weights)
            pieces = pieces_of(rows, min(batch, most))
            work = partial(self._part, leaves, size)
            (loss,), found = self._running.own_gradients(
                pieces, work, list(leaves.values()), owners
            )
            return loss, found

        return self._execution.halving(attempt)

    def _placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights at addresses that stay, which gradients are taken of."""
        if self._leaves.keys() != weights.keys():
            dtype, device = self._block.runner.dtype, self._block.runner.device
            self._places.clear()
            self._leaves = {
                name: torch.empty_like(w, dtype=dtype, device=device).requires_grad_()
                for name, w in weights.items()
            }
        with torch.no_grad():
            for name, weight in weights.items():
                self._leaves[name].copy_(weight)
        return self._leaves

    def _part(self, leaves: Mapping[str, Tensor], size: int, piece: Piece) -> Part:
        """The share of a piece in the loss and in its gradients."""
        hidden, target, side = self._rows(piece)
        if side:  # what the model makes of it is made anew for each piece
            loss, *found = self._gradients(leaves, size, hidden, target, side)
            return loss, found
        place = self._places.get((len(piece), size))
        if place is None:
            recorded = Recorded(self._block.runner.recorder, recordable=self._alike)
            place = _Place(hidden.clone(), target.clone(), recorded)
            self._places[len(piece), size] = place
        place.hidden.copy_(hidden)
        place.target.copy_(target)
        loss, *found = place.recorded.run(
            partial(self._gradients, leaves, size, place.hidden, place.target, {})
        )
        return loss.clone(), found

    def _gradients(
        self,
        leaves: Mapping[str, Tensor],
        size: int,
        hidden: Tensor,
        target: Tensor,
        side: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """A share of the loss, and its gradient for each of the weights."""
        on_cpu = self._block.runner.device.type == "cpu"
        quick = torch.autocast("cpu", torch.bfloat16, enabled=on_cpu and multiplies_bfloat16())
        with quick:  # type: ignore[no-untyped-call]
            error = self._error(leaves, hidden, target, side) / size
        # An expert that no token went to has none.
        found = torch.autograd.grad(
            error, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return [error.detach(), *found]

    def _counted(self) -> int:
        return max(self._targets.hidden.shape[1] - 1, 1)

    def _size(self, rows: Sequence[int]) -> int:
        return len(rows) * self._counted() * self._targets.hidden.shape[2]

    def _rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What enters for these rows, what is to leave, and what they have beside them."""
        device, dtype = self._block.runner.device, self._block.runner.dtype
        index = torch.tensor(rows, device=self._inputs.hidden.device)
        side = {n: tensor[list(rows)] for n, tensor in self._inputs.beside(0, self.rows).items()}
        hidden = self._inputs.hidden[index].to(device, dtype)
        return hidden, self._targets.hidden[index].to(device), side

    def _error_of(self, weights: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
        return self._error(weights, *self._rows(rows))

    def _error(
        self,
        weights: Mapping[str, Tensor],
        hidden: Tensor,
        target: Tensor,
        side: Mapping[str, Tensor],
    ) -> Tensor:
        """Sum of squared errors of rows, in float32."""
        named = {weight_name(name): weight for name, weight in weights.items()}
        with quantized_inputs(self._block, self._rounded):
            out = self._block.functional({**self._tensors, **named}, hidden, side)
        kept = slice(None, self._counted())
        return (out[:, kept].float() - target[:, kept].float()).square().sum()


@dataclass(slots=True)
class _Place:
    """Where the rows of a piece lie, and its work as it was recorded there."""

    hidden: Tensor
    target: Tensor
    recorded: Recorded


class StraightInput(StoredInput):
    """A quantized input through which gradients pass."""

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = super().__call__(x)
        return x + (rounded - x).detach() if x.requires_grad else rounded
