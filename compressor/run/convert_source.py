"""The source of a conversion: read once without its codes, to know what becomes of it, and once
whole.

Whether a weight has a form in another format is a matter of its scales and zero points, a tenth of
its bytes. What is read is hashed both times, so that a source that changes in between is noticed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from compressor.checkpoint.read_ahead import read_ahead
from compressor.checkpoint.reader import hash_of
from compressor.checkpoint.records import stated_hash
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.ir.unit import Unit

Stored = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors of a unit as they are stored, and the digest of each."""


@dataclass(slots=True)
class ConvertedSource:
    """A source whose units are read in order; a GPU works while the next one is read."""

    source: Source
    device: torch.device
    _digests: dict[str, dict[str, str]] = field(default_factory=dict)
    _reading: Iterator[Callable[[], Stored]] = field(default_factory=lambda: iter(()))
    _rest: deque[UnitLayout] = field(default_factory=deque)  # of that
    _next: tuple[str, bool] | None = None  # what it reads next: of which unit, and whether whole

    @property
    def beside_codes(self) -> str:
        """One hash for all that was read without codes."""
        hashes = {}
        for unit in self.source.layout.units:
            codes, digests = {*self._apart(unit)}, self._digests[unit.name]
            hashes[unit.name] = hash_of({n: d for n, d in digests.items() if n not in codes})
        return stated_hash(hashes)

    def without_codes(self, unit: UnitLayout) -> Unit:
        """A unit without its integer codes (shapes alone, or zeros), where the format keeps them
        apart."""
        raw = self._read(unit, whole=False)
        specs = {name: self.source.checkpoint.entry(name).spec for name in self._apart(unit)}
        # A GPU unpacks zeros at once; for operations on meta tensors PyTorch imports for seconds.
        where = self.device if self._on_gpu else torch.device("meta")
        empty = {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=where)
            for name, spec in specs.items()
        }
        return self._unit(unit, {**raw, **empty})

    def whole(self, unit: UnitLayout) -> Unit:
        """A unit. Raises InputError where it is not what it was the first time."""
        return self._unit(unit, self._read(unit, whole=True))

    def content(self, unit: UnitLayout) -> str:
        """The hash of all that a unit holds, which is read where it has not been."""
        known = self._digests.get(unit.name, {})
        if not known.keys() >= {*self.source.names(unit)}:
            self._read(unit, whole=True)
        return hash_of(self._digests[unit.name])

    def _unit(self, unit: UnitLayout, raw: Mapping[str, Tensor]) -> Unit:
        found = self.source.assemble(unit, raw, device=self.device)
        here = {name: t.to(self.device, non_blocking=True) for name, t in found.tensors.items()}
        return replace(found, tensors=here)

    def _read(self, unit: UnitLayout, *, whole: bool) -> dict[str, Tensor]:
        if self._next != (unit.name, whole):
            units = self.source.layout.units
            self._rest = deque(units[units.index(unit) :])
            read = partial(self._stored, whole=whole)
            self._reading = read_ahead(read, list(self._rest), ahead=self._on_gpu)
        self._rest.popleft()
        self._next = (self._rest[0].name, whole) if self._rest else None
        raw, digests = next(self._reading)()
        before = self._digests.get(unit.name, {})
        if any(digests[name] != digest for name, digest in before.items() if name in digests):
            raise InputError(f"{unit.name} of the source changed while it was converted")
        self._digests[unit.name] = {**before, **digests}
        return raw

    def _stored(self, unit: UnitLayout, *, whole: bool) -> Stored:
        left: Sequence[str] = () if whole else self._apart(unit)
        names = [name for name in self.source.names(unit) if name not in left]
        return self.source.checkpoint.read_hashed(names, pin=self._on_gpu)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _apart(self, unit: UnitLayout) -> list[str]:
        """Names of those tensors that hold integer codes and nothing else."""
        source = self.source
        specs = {x.name: source.schemes.linears[x.name].weight for x in unit.linears}
        coded = [name for name, spec in specs.items() if spec is not None and spec.element == "int"]
        paths = {f"{name}.{leaf}" for name in coded for leaf in source.format.codes}
        return [name for name in source.names(unit) if name in paths]
