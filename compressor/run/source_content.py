"""A source that is the same whenever it is read: each unit's content is hashed, and compared."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.checkpoint.reader import hash_of
from compressor.errors import InputError
from compressor.ir.unit import Unit
from compressor.plan.plan import Plan
from compressor.run.settings import JobSettings


@dataclass(slots=True)
class SourceContent:
    """Units of a plan's source as this process found them.

    hashes  by the index of the unit, of those that have been read
    """

    plan: Plan
    hashes: dict[int, str] = field(default_factory=dict)

    def read(self, index: int, *, pin: bool = False) -> Unit:
        """One unit, on the CPU. Raises InputError where it is not what it was."""
        source, layout = self.plan.source, self.plan.units[index].layout
        raw, digests = source.checkpoint.read_hashed(source.names(layout), pin=pin)
        self.note(index, hash_of(digests))
        return source.assemble(layout, raw)

    def read_part(
        self, index: int, names: Sequence[str], *, pin: bool = False
    ) -> tuple[Unit, dict[str, str]]:
        """Some tensors of a unit of floats, on the CPU, and the digest of each."""
        raw, digests = self.plan.source.checkpoint.read_hashed(names, pin=pin)
        return self.plan.source.assemble(self.plan.units[index].layout, raw), digests

    def note(self, index: int, digest: str) -> None:
        """A unit has been read, here or by another process, and has this hash. Raises InputError
        where it is not what it was."""
        if self.hashes.setdefault(index, digest) != digest:
            raise InputError(
                f"{self.plan.units[index].layout.name} of the source changed while this run read "
                "it",
                hint="leave the source alone, and start anew in another folder",
            )

    def look(self, units: Iterable[int], settings: JobSettings) -> dict[int, str]:
        """The hashes of some units; those that are not known yet are read for it.

        Raises Interrupted when asked to stop.
        """
        wanted = list(units)
        unknown = [index for index in wanted if index not in self.hashes]
        for done, index in enumerate(unknown, 1):
            settings.check_stop()
            layout = self.plan.units[index].layout
            _, digests = self.plan.source.checkpoint.read_hashed(self.plan.source.names(layout))
            self.note(index, hash_of(digests))
            settings.on_step(f"source of {layout.name}", done, len(unknown))
        return {index: self.hashes[index] for index in wanted}

    def require(self, before: Mapping[int, str]) -> None:
        """Raises InputError with the name of the first unit that an interrupted run read as
        something else. All of them are known."""
        for index, digest in sorted(before.items()):
            if self.hashes[index] != digest:
                raise InputError(
                    f"{self.plan.units[index].layout.name} of the source is not what the "
                    "interrupted run read",
                    hint="restore the source, or start anew in another folder",
                )

    @property
    def whole(self) -> str:
        """One hash for all units, in order."""
        lines = (self.hashes[index] for index in range(len(self.plan.units)))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
