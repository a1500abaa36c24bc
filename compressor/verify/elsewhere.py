"""The comparison with an original, made in a process of its own: there, and here."""

import math
from collections.abc import Sequence

import torch

from compressor.verify.apart import Apart, Compared
from compressor.verify.checks.base import Check
from compressor.verify.checks.original import Original
from compressor.verify.findings import Findings, NothingMore
from compressor.verify.subject import Subject
from compressor.verify.walk import walk

ROOM = 24
"""Bytes of a GPU's free memory for each weight of the largest unit, from which two processes go
through it beside each other: it and the original's in float32, what is rounded or moved of that,
and both as they are stored."""


def has_room(subject: Subject) -> bool:
    """Whether the device has memory for another process that compares."""
    if not subject.on_gpu:
        return True
    entries = subject.source.checkpoint.entries
    free, _ = torch.cuda.mem_get_info(subject.device)
    sizes = [sum(math.prod(x.shape) for x in u.linears) for u in subject.source.layout.units]
    stored = [
        sum(math.prod(entries[name].spec.shape) for name in u.tensors if name in entries)
        for u in subject.source.layout.units
    ]
    return free >= ROOM * max(*sizes, *stored)


def compare(subject: Subject) -> Compared:
    """Hold a subject against its original, unit by unit."""
    begun, ended = Findings(), Findings()
    check, unread = Original(subject, begun), Unread(subject, begun)
    try:
        walk(subject, [check, unread], begun)
    except NothingMore:
        return Compared(begun, None)
    check.found = ended
    check.conclude()
    return Compared(begun, ended, tuple(unread.problems))


class Unread(Check):
    """Units that could not be read to their end."""

    def unread(self, problem: str) -> None:
        self.problems.append(problem)


class Elsewhere(Unread):
    """`Original`, by what another process found; made here once the other checks are done where
    that one did not get to it."""

    def __init__(self, subject: Subject, found: Findings, apart: Apart) -> None:
        super().__init__(subject, found)
        self.apart = apart
        self.compared: Compared | None = None

    def begin(self) -> None:
        self.apart.compare(self.subject)

    def join(self, checks: Sequence[Check]) -> None:
        """Wait for it, after the last unit, and tell all `checks` what could not be read there.
        Raises NothingMore where the original has nothing to do with what was written."""
        self.compared = self.apart.compared() or compare(self.subject)
        self.found.take(self.compared.begun)
        if self.compared.ended is None:
            self.found.layers.clear()
            raise NothingMore
        for problem in [p for p in self.compared.unread if p not in self.problems]:
            for check in checks:
                check.unread(problem)

    def conclude(self) -> None:
        assert self.compared is not None and self.compared.ended is not None
        self.found.take(self.compared.ended)
