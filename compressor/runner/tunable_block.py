"""A block that runs with gradients, the rows that enter it, and what the original makes of its own.

What is learned of a block by gradients needs two things of it: the error of its outputs under
candidate weights, and the gradient of that. Names in memory, stacks of experts, the dtype in which
blocks run, batches that fit the device and the graph of a step on a GPU stay here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

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


UNASKED = 16
"""Steps between two times that ranks ask each other whether to stop, once theirs are graphs."""


class Folding(Protocol):
    """A weight with few parameters, of whose gradient little is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""

    @property
    def folded(self) -> tuple[int, ...]:
        """The shape of what is needed of its gradient."""

    def write(self, out: Tensor) -> None:
        """Puts the weight as it stands into [out, in]."""

    def fold(self, gradient: Tensor) -> Tensor:
        """What is needed of its gradient, float32; linear in it, and the same work each time."""


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
        self._steps, self._settled, self._fresh = 0, False, False
        self._rounded = {
            x.name: StraightInput(scheme.input, unit.input_scales.get(x.name))
            for x in unit.layout.linears
            if (scheme := (schemes or {}).get(x.name)) and scheme.input and x.expert is None
        }
        self._tensors = {n: t.to(device, dtype) for n, t in unit.dequantized(dtype).items()}
        # How many tokens an expert is sent differs, and so do shapes.
        self._alike = all(linear.expert is None for linear in unit.layout.linears)
        self._leaves: dict[str, Tensor] = {}
        self._places: dict[tuple[str, int, int], _Place] = {}

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
            (loss,) = self._running.losses(
                pieces_of(rows, batch), lambda piece: self._error(weights, *self._rows(piece))
            )
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
        size, most = self._size(rows), self._at_a_time(weights)

        def attempt(batch: int) -> tuple[float, list[Tensor]]:
            leaves = self._leaves_like(weights)
            with torch.no_grad():
                for name, weight in weights.items():
                    leaves[name].copy_(weight)
            gradients = partial(self._gradients, leaves, size)

            def work(piece: Piece) -> Part:
                loss, *found = self._part(gradients, size, piece)
                return loss.clone(), found

            (loss,), found = self._running.own_gradients(
                pieces_of(rows, min(batch, most)), work, list(leaves.values()), owners
            )
            return loss, found

        return self._execution.halving(attempt)

    def loss_and_folded(
        self, weights: Mapping[str, Folding], rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`loss` as a scalar, and what is folded of its gradient for each of the weights, on every
        rank, which all have all weights. No processor waits for a GPU.
        """
        self._steps += 1
        if not self._settled or self._steps % UNASKED == 0:
            self._execution.check_stop()
        size, most = self._size(rows), self._at_a_time(weights)
        shapes = [weight.folded for weight in weights.values()]
        sizes = [math.prod(shape) for shape in shapes]

        def attempt(batch: int) -> Tensor:
            leaves = self._leaves_like(weights)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.write(leaves[name])
            gradients = partial(self._folded, leaves, weights, size)
            self._fresh = False
            total, self._settled = self._running.vectors(
                pieces_of(rows, min(batch, most)),
                lambda piece: self._part(gradients, size, piece)[0],
                1 + sum(sizes),
                settled=lambda: not self._fresh,
                certain=self._settled,
            )
            return total

        loss, *found = torch.split(self._execution.halving(attempt), [1, *sizes])
        return loss[0], [x.view(shape) for x, shape in zip(found, shapes, strict=True)]

    def _at_a_time(self, weights: Mapping[str, Tensor] | Mapping[str, Folding]) -> int:
        """Rows of a piece at most."""
        count = sum(math.prod(weight.shape) for weight in weights.values())
        return max(1, max(TOKENS, WORK // max(count, 1)) // self._targets.hidden.shape[1])

    def _leaves_like(
        self, weights: Mapping[str, Tensor] | Mapping[str, Folding]
    ) -> dict[str, Tensor]:
        """Room for the weights at addresses that stay, which gradients are taken of."""
        if self._leaves.keys() != weights.keys():
            dtype, device = self._block.runner.dtype, self._block.runner.device
            self._places.clear()
            self._leaves = {
                name: torch.empty(w.shape, dtype=dtype, device=device).requires_grad_()
                for name, w in weights.items()
            }
        return self._leaves

    def _part(self, work: partial[list[Tensor]], size: int, piece: Piece) -> Sequence[Tensor]:
        """What work gives on a piece's hidden states, targets and what they have beside them; the
        next piece overwrites it."""
        hidden, target, side = self._rows(piece)
        if side:  # what the model makes of it is made anew for each piece
            self._fresh = True
            return work(hidden, target, side)
        # Not by the method itself, which would hold the block, and its memory, in a circle.
        key = work.func.__name__, len(piece), size
        place = self._places.get(key)
        if place is None:
            recorded = Recorded(self._block.runner.recorder, recordable=self._alike)
            place = self._places[key] = _Place(hidden.clone(), target.clone(), recorded)
        place.hidden.copy_(hidden)
        place.target.copy_(target)
        self._fresh = self._fresh or not place.recorded.replays
        return place.recorded.run(partial(work, place.hidden, place.target, {}))

    def _folded(
        self,
        leaves: Mapping[str, Tensor],
        weights: Mapping[str, Folding],
        size: int,
        hidden: Tensor,
        target: Tensor,
        side: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The same share, and what is folded of its gradients, in one vector."""
        loss, *found = self._gradients(leaves, size, hidden, target, side)
        with torch.no_grad():
            folded = [w.fold(g).flatten() for w, g in zip(weights.values(), found, strict=True)]
            return [torch.cat([loss.float().view(1), *folded])]

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
        side = {n: tensor[list(rows)] for n, tensor in self._inputs.beside(0, self.rows).items()}
        # Row by row: an index would wait until the GPU has it.
        hidden, target = (
            torch.stack([stream.hidden[row] for row in rows])
            for stream in (self._inputs, self._targets)
        )
        return hidden.to(device, dtype), target.to(device), side

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
