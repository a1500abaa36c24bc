"""Units of a subject, shown to checks one after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from compressor.checkpoint.read_ahead import read_ahead
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.ranks.ranks import Ranks
from compressor.runner.execution import Progress
from compressor.runner.heap import give_back
from compressor.verify.checks.base import Check
from compressor.verify.findings import Findings, LayerVerdict, NothingMore
from compressor.verify.subject import Subject


def walk(
    subject: Subject, checks: Sequence[Check], found: Findings, progress: Progress | None = None
) -> None:
    """Show the checks every unit, and put together what they found in the units' order.

    Raises NothingMore, on all ranks or on none, before a second unit is read.
    """
    ranks, count = subject.ranks, len(subject.source.layout.units)
    made: dict[int, tuple[dict[str, LayerVerdict], list[list[list[Any]]]]] = {}
    with _agreed(ranks):
        for check in checks:
            check.begin()
    units = subject.units
    decoding = any(type(check).layer is not Check.layer for check in checks)
    read = subject.ahead if decoding else subject.stored
    reading = read_ahead(read, list(units.values()), ahead=subject.on_gpu)
    for (index, unit), stored in zip(units.items(), reading, strict=True):
        with nullcontext() if index else _agreed(ranks):
            _show(unit, stored, subject, checks, decoding=decoding)
        added = found.gathered(), [check.gathered() for check in checks]
        if index or ranks.leads:  # all look at the first unit
            made[index] = added
        give_back()
        if progress is not None:
            progress(unit.name, index + 1, count)
    every = {index: added for some in ranks.gather(made) for index, added in some.items()}
    for _, (layers, lists) in sorted(every.items()):
        found.layers |= layers
        for check, gathered in zip(checks, lists, strict=True):
            check.put(gathered)


@contextmanager
def _agreed(ranks: Ranks) -> Iterator[None]:
    """NothingMore ends all ranks or none."""
    try:
        yield
    except NothingMore:
        ranks.agree(1, "the model")
        raise
    ranks.agree(0, "the model")


def _show(
    unit: UnitLayout,
    read: Callable[[], dict[str, Tensor]],
    subject: Subject,
    checks: Sequence[Check],
    *,
    decoding: bool,
) -> None:
    """Each check what there is of a unit; a layer is decoded once for all that look at layers."""
    try:
        stored = read()
        for check in checks:
            check.stored(stored)
        tensors = subject.read(unit, stored)
        here = subject.on_device(tensors)
        for check in checks:
            check.read(here)
        for linear, layer in subject.layers(unit, tensors, here) if decoding else ():
            for check in checks:
                check.layer(linear, layer)
        for check in checks:
            check.unit(unit, here)
    except InputError as error:
        for check in checks:
            check.unread(f"{unit.name}: {error.message}")
    for check in checks:
        check.over(unit)
