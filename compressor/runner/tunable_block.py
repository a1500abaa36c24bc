"""A block that runs with gradients, the rows that enter it, and what the original makes of its own.

Rows run in pieces whose size follows from the recipe, so that ranks that share them add up what one
process adds up.

What is learned of a block by gradients needs two things of it: the error of its outputs under
candidate weights, and the gradient of that. Names in memory, stacks of experts, the dtype in which
blocks run and batches that fit the device stay here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressor.ir.layout import weight_name
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.runner.block_runner import Block
from compressor.runner.rounds import AgreedShortage
from compressor.runner.simulate import StoredInput, quantized_inputs
from compressor.runner.stream import Stream

if TYPE_CHECKING:
    from compressor.runner.sweep import Execution


T = TypeVar("T")

PIECES = 4
"""Into how many pieces rows are divided at least, where there are as many."""
TOKENS = 1024
"""Tokens of a piece that runs with gradients at most, or one row: more keep no GPU busier."""


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
        self._execution, self._strict = execution, True
        device, dtype = block.runner.device, block.runner.dtype
        self._rounded = {
            x.name: StraightInput(scheme.input, unit.input_scales.get(x.name))
            for x in unit.layout.linears
            if (scheme := (schemes or {}).get(x.name)) and scheme.input and x.expert is None
        }
        self._tensors = {n: t.to(device, dtype) for n, t in unit.dequantized(dtype).items()}

    @property
    def dtype(self) -> torch.dtype:
        """In which the block runs."""
        return self._block.runner.dtype

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._inputs.rows

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor], rows: Sequence[int]) -> float:
        """Mean squared error of what leaves the block for these rows.

        weights  module path → [out, in], in place of those of the unit
        Raises Interrupted when asked to stop.
        """
        self._execution.check_stop()

        def attempt(batch: int) -> float:
            pieces = _pieces(rows, batch)

            def work() -> tuple[list[Tensor], None]:
                return [self._error(weights, piece) for piece in self._mine(pieces)], None

            return self._agreed(len(pieces), work)[0]

        return self._execution.halving(attempt) / self._size(rows)

    def loss_and_gradients(
        self, weights: Mapping[str, Tensor], rows: Sequence[int], owners: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        """`loss`, and its gradient [out, in] for each of the weights that are this rank's; the same
        on every run of one machine.

        owners  the rank of each weight
        """
        self._execution.check_stop()
        dtype, size = self._block.runner.dtype, self._size(rows)
        most, ranks = max(1, TOKENS // self._targets.hidden.shape[1]), self._execution.ranks

        def attempt(batch: int) -> tuple[float, list[Tensor]]:
            leaves = {n: w.detach().to(dtype).requires_grad_() for n, w in weights.items()}
            like, pieces = list(leaves.values()), _pieces(rows, min(batch, most))
            errors: list[Tensor] = []

            def gradients() -> Iterator[Sequence[Tensor]]:
                for piece in self._mine(pieces):
                    error, found = self._repeatable(partial(of_piece, piece))
                    errors.append(error)
                    yield found

            def of_piece(piece: Sequence[int]) -> tuple[Tensor, Sequence[Tensor]]:
                error = self._error(leaves, piece) / size
                # An expert that no token went to has none.
                found = torch.autograd.grad(error, like, allow_unused=True, materialize_grads=True)
                return error.detach(), found

            def work() -> tuple[list[Tensor], list[Sequence[Tensor]]]:
                if ranks.world > 1:
                    return errors, list(gradients())
                # One piece's are in memory at a time.
                return errors, [ranks.summed(gradients(), len(pieces), like, owners)]

            loss, made = self._agreed(len(pieces), work)
            return loss, ranks.summed(made, len(pieces), like, owners)

        with torch.enable_grad():
            return self._execution.halving(attempt)

    def _repeatable(self, work: Callable[[], T]) -> T:
        """What kernels give whose sums have one order, as far as what runs has such kernels."""
        try:
            with _deterministic(self._block.runner.device, strict=self._strict):
                return work()
        except RuntimeError as error:
            if not self._strict or "deterministic" not in str(error).lower():
                raise
        self._strict = False
        with _deterministic(self._block.runner.device, strict=False):
            return work()

    def _mine(self, pieces: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The pieces that this rank runs."""
        return [pieces[i] for i in self._execution.ranks.own(len(pieces))]

    def _agreed(self, count: int, work: Callable[[], tuple[list[Tensor], T]]) -> tuple[float, T]:
        """The sum of the errors of all pieces in their order, of which this rank finds its own, and
        what it makes beside them. Where one is short of memory all of them are."""
        ranks = self._execution.ranks
        found = torch.zeros(count + 1, dtype=torch.float64)
        made: list[T] = []
        try:
            errors, beside = work()
            for number, error in zip(ranks.own(count), errors, strict=True):
                found[number] = error.double()
            made.append(beside)
        except torch.OutOfMemoryError:
            if ranks.world == 1:
                raise
            found[count] = 1
        *values, short = ranks.sum(found).tolist()
        if short:
            raise AgreedShortage
        return sum(values), made[0]

    def _counted(self) -> int:
        return max(self._targets.hidden.shape[1] - 1, 1)

    def _size(self, rows: Sequence[int]) -> int:
        return len(rows) * self._counted() * self._targets.hidden.shape[2]

    def _error(self, weights: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Sum of squared errors of these rows, in float32."""
        index = torch.tensor(rows, device=self._inputs.hidden.device)
        beside = self._inputs.beside(0, self.rows)
        side = {name: tensor[list(rows)] for name, tensor in beside.items()}
        named = {weight_name(name): weight for name, weight in weights.items()}
        tensors = {**self._tensors, **named}
        with quantized_inputs(self._block, self._rounded):
            out = self._block.functional(tensors, self._inputs.hidden[index], side)
        target = self._targets.hidden[index].to(out.device)
        kept = slice(None, self._counted())
        return (out[:, kept].float() - target[:, kept].float()).square().sum()


def _pieces(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    """The rows in order, at most so many at a time, in several pieces where there are as many."""
    size = min(most, -(-len(rows) // PIECES))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class StraightInput(StoredInput):
    """A quantized input through which gradients pass."""

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = super().__call__(x)
        return x + (rounded - x).detach() if x.requires_grad else rounded


@contextmanager
def _deterministic(device: torch.device, *, strict: bool) -> Iterator[None]:
    """Kernels on a GPU whose sums have one order, for the length of a `with`.

    strict  what has no such kernel raises RuntimeError; where it may run all the same, flash
            attention takes its kernel that has none, too
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        warnings.simplefilter("ignore")  # what has no such kernel says so each time
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
