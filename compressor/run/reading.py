"""Reads the source's units. Of several ranks each reads a part of a block, and has the rest sent by
those that read it: a link between GPUs is faster than a disk, and than hashing."""

from dataclasses import dataclass, field, replace

import torch

from compressor.checkpoint.reader import hash_of
from compressor.ir.floats import fill, room_for
from compressor.ir.same_shape import homes
from compressor.ir.unit import Unit
from compressor.plan.plan import Plan
from compressor.ranks.parcel import hollow
from compressor.ranks.ranks import Ranks
from compressor.run.ahead import Ahead
from compressor.run.placing import room
from compressor.run.source_content import SourceContent


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads units of a plan's source, and notes their hashes.

    spread  blocks, by index of the unit, of which each rank has some experts alone
    apart   experts wait in main memory, so that no rank is sent a block by others
    ahead   brings blocks to the device once they are read; None: whoever works on them does
    """

    plan: Plan
    content: SourceContent
    device: torch.device
    ranks: Ranks
    spread: frozenset[int] = frozenset()
    apart: bool = False
    ahead: Ahead | None = None
    _digests: dict[int, dict[str, str]] = field(default_factory=dict)  # of what was read here
    _coming: dict[int, torch.cuda.Event] = field(default_factory=dict)  # once they are there

    def read(self, index: int) -> Unit:
        """A unit on the CPU, or on its way to the device, or this rank's part of it."""
        pin = self.device.type == "cuda"
        if self.ahead is not None:
            self.ahead.settle()
        if not self._divided(index):
            return self._brought(index, self.content.read(index, pin=pin))
        part, self._digests[index] = self.content.read_part(index, self._mine(index), pin=pin)
        return self._brought(index, part)

    def _brought(self, index: int, part: Unit) -> Unit:
        unit = self.plan.units[index]
        if self.ahead is None or unit.layout.kind != "block":
            return part
        tensors = part.tensors
        if self._divided(index):  # what others read is missing in stacks
            here = self.ahead.bring(tensors, lambda: room_for(tensors, self.device))
        else:
            here = self.ahead.bring(tensors, lambda: room(self.plan, unit, tensors, self.device))
        if here is None:
            return part
        self._coming[index] = here.there
        return replace(part, tensors=here.tensors)

    def whole(self, index: int, part: Unit) -> Unit:
        """The unit of which every rank has read a part, then on the device; all ask together.
        Experts that other ranks have alone are on the meta device."""
        if self.ahead is not None and (there := self._coming.pop(index, None)) is not None:
            self.ahead.follow(there)
        if not self._divided(index):
            return part
        tensors, digests = {**part.tensors, **part.extra}, self._digests.pop(index)
        home = self._at_one(index)
        read = {name: tensors[name] for name in self._mine(index)}
        here = fill(room_for(read, self.device), read)
        own = {name: (tensor, digests[name]) for name, tensor in here.items()}
        told = {n: hollow(x) if n in home else x for n, x in own.items()}
        found = {n: x for every in self.ranks.gather(told) for n, x in every.items()} | own
        found = {name: found[name] for name in self._names(index)}
        self.content.note(index, hash_of({name: digest for name, (_, digest) in found.items()}))
        layout = self.plan.units[index].layout
        return self.plan.source.assemble(layout, {name: t for name, (t, _) in found.items()})

    def homes(self, index: int) -> dict[int, int]:
        """The rank that has each expert of a block alone, where they are spread."""
        linears = self.plan.units[index].layout.linears
        return homes(linears, self.ranks.world) if index in self.spread else {}

    def own_of(self, unit: Unit) -> Unit:
        """A coded block with those of its experts alone that this rank has."""
        place = next(i for i, x in enumerate(self.plan.units) if x.layout is unit.layout)
        home = self.homes(place)
        return unit.without(
            x
            for x in unit.layout.linears
            if x.expert is not None and home.get(x.expert, self.ranks.rank) != self.ranks.rank
        )

    def _at_one(self, index: int) -> dict[str, int]:
        """The rank that has a tensor, of those that one has alone."""
        home = self.homes(index)
        linears = self.plan.units[index].layout.linears if home else ()
        return {x.weight_name: home[x.expert] for x in linears if x.expert is not None}

    def _divided(self, index: int) -> bool:
        """Blocks are, where no tensor is decoded from several; what else a model carries the
        device may have no room for."""
        layout = self.plan.units[index].layout
        block = layout.kind == "block" and not (self.apart and layout.experts)
        return self.ranks.world > 1 and block and not self.plan.source.quantized

    def _names(self, index: int) -> tuple[str, ...]:
        return self.plan.source.names(self.plan.units[index].layout)

    def _mine(self, index: int) -> list[str]:
        """What this rank reads of a divided unit, beside what it has alone: tensors that follow one
        another in a file."""
        home, entry = self._at_one(index), self.plan.source.checkpoint.entry
        names = sorted(self._names(index), key=lambda n: (entry(n).file, entry(n).begin))
        total = sum(entry(n).spec.nbytes for n in names if n not in home)
        mine, done = [], 0
        for name in names:
            reader = home.get(name)
            if reader is None:
                reader = done * self.ranks.world // max(total, 1)
                done += entry(name).spec.nbytes
            if reader == self.ranks.rank:
                mine.append(name)
        return mine
