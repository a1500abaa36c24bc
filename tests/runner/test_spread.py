"""Batches of a block whose experts are spread, seen from one rank."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.runner import spread
from compressor.runner.execution import Execution


def test_a_batch_that_was_made_before_another_rank_halved_is_halved_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = nn.Identity()
    block: Any = SimpleNamespace(
        unit=SimpleNamespace(experts=2, linears=[SimpleNamespace(expert=0)]),
        groups={module: SimpleNamespace(experts=range(1))},
        module=lambda linear: module,
    )
    execution, first_time = Execution(2), spread._first_time

    def and_another_halves(*args: Any) -> Any:
        found = first_time(*args)
        execution.batch = 1  # as ranks agree on once each has ended its first time
        return found

    def made(block: Any, calls: list[Any], ranks: Any) -> list[Tensor]:
        return [hidden for hidden, *_ in calls]

    sizes: list[int] = []

    def attempt(start: int, stop: int) -> Tensor:
        hidden = torch.full((stop - start, 1), start)
        out: Tensor = module.forward(hidden, hidden, hidden)  # raises the first time
        sizes.append(stop - start)
        if stop - start > 1:
            raise torch.OutOfMemoryError("out of memory")
        return out

    monkeypatch.setattr(spread, "_first_time", and_another_halves)
    monkeypatch.setattr(spread, "_made", made)
    monkeypatch.setattr(spread, "routing", lambda args, kwargs: args)
    found = list(spread.batches_of(block, 3, attempt, execution, None))
    assert [(start, stop, out.item()) for start, stop, out in found] == [
        (0, 1, 0),
        (1, 2, 1),
        (2, 3, 2),
    ]
    assert sizes == [2, 1, 1, 1] and execution.batch == 1
