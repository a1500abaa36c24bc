"""A written checkpoint held against its original: every tensor, every key and file that decides the
function, and what each block computes.

Nothing that the run recorded loosens a check: what rounding may do is measured on the original.
What cannot be compared is a failure that says so.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from compressor.checkpoint.offsite import read_offsite_record
from compressor.checkpoint.read_ahead import read_ahead
from compressor.checkpoint.source import Source, not_finite
from compressor.errors import InputError, several
from compressor.ir.floats import Floats, Packed
from compressor.ir.layout import Linear, UnitLayout, weight_name
from compressor.ir.unit import Unit
from compressor.runner.heap import give_back
from compressor.runner.model import has_class
from compressor.verify.alignment import Matrix, rotation_between
from compressor.verify.checks.base import Check
from compressor.verify.coded_later import CodedLater, assembled_but_experts
from compressor.verify.compare import (
    Difference,
    UnitComparison,
    comparable,
    float_floor,
)
from compressor.verify.compare_config import config_problems, file_problems, storage_problems
from compressor.verify.compare_outputs import WHOLE, OutputError, Outputs, held_out_rows
from compressor.verify.compare_policy import policy_problems
from compressor.verify.findings import BlockVerdict, LayerVerdict, NothingMore

UNRELATED = 0.5
"""Median error of an embedding's rows, best rotated, from which it is another model's."""

ROTATED = 0.05
"""The same without a rotation, from which one is looked for."""

ROWS_AT_ONCE = 4096
"""Rows of an embedding whose difference is in memory at a time."""


class Original(Check):
    """The comparison of one subject, unit by unit, where there is an original."""

    original: Source

    gathers = ("problems", "differences", "blocks")

    def begin(self) -> None:
        """Config, tokenizer, generation ids, attention policy."""
        self.differences: list[Difference] = []
        self.blocks: list[OutputError] = []
        self.rotation: Matrix | None = None
        self.outputs: Outputs | None = None
        if self.subject.original is None:
            return
        self.written, self.original = self.subject.source, self.subject.original
        self.device, self.folder = self.subject.device, self.subject.folder
        written, original = self.written.checkpoint, self.original.checkpoint
        mapped = not self.original.arch.free and has_class(original.config)
        problems = config_problems(written.config, original.config, known=mapped)
        problems += storage_problems(self.written, self.original)
        self.found.add("config to the original", problems, "every key that decides the function")
        problems, alike = file_problems(self.folder, original.folder)
        detail = f"{alike} files: tokenizer, templates, generation"
        self.found.add("files to the original", problems, detail)
        problems, detail = policy_problems(self.folder, self.original, self.written)
        if problems or detail:
            self.found.add("policy to the original", problems, detail)
        if not same_units(self.written, self.original):
            self._unrelated(
                f"{original.folder.name} has other blocks or sizes: it is another model"
            )
        if not self.original.arch.free:
            # Now, and with what a tokenizer took while it was read given back, since embeddings are
            # large.
            self.rows = held_out_rows(self.original)
            give_back()
        alone = {*self.written.layout.carried} ^ {*self.original.layout.carried}
        self.problems += [f"{name} is in one of the two alone" for name in sorted(alone)]
        self.layouts = {unit.name: unit for unit in self.original.layout.units}
        record = read_offsite_record(self.folder)
        trained = () if record is None else record.trained
        self.trained = {self.original.layout.blocks[i].name for i in trained}
        units = [self.layouts.get(unit.name, unit) for unit in self.subject.units.values()]
        reading = read_ahead(self._stored, units, ahead=self.subject.on_gpu)
        self.reading = zip(units, reading, strict=True)

    def unit(self, unit: UnitLayout, tensors: dict[str, Tensor]) -> None:
        if self.subject.original is not None:
            # Units of which the written one could not be read are passed over.
            stored = next(read for layout, read in self.reading if layout.name == unit.name)
            self._compare(unit, tensors, stored())

    def over(self, unit: UnitLayout) -> None:
        """What the blocks compute goes on, also past one that could not be compared."""
        if self.subject.original is None:
            return
        if unit.kind == "embedding":
            self.subject.ranks.agree(self.outputs is None, "what the original computes")
        elif unit.kind == "block" and self.outputs is not None and self.outputs.relay is not None:
            self.outputs.relay.skip(unit.index + 1)

    def _stored(self, layout: UnitLayout) -> dict[str, Tensor]:
        """The original's tensors of a unit, but those that are carried over."""
        if layout.kind == "beside":
            return {}
        names = self.original.names(layout, carried=False)
        return self.original.checkpoint.read(names, pin=self.subject.on_gpu)

    def _compare(
        self, written: UnitLayout, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
    ) -> None:
        if written.kind == "beside":
            self._carried(self.written.assemble(written, tensors))
            return
        layout = self.layouts[written.name]
        unit, experts = assembled_but_experts(self.written, written, tensors)
        after = self._floats(unit, experts)
        experts_of = {x.name for x in layout.linears if x.expert is not None}
        here = {
            name: t if name.rpartition(".")[0] in experts_of else t.to(self.device)
            for name, t in stored.items()
        }
        before = self._floats(*assembled_but_experts(self.original, layout, here))
        del here, stored  # on a CPU there would be two of a tensor that is not in float32
        if unit.layout.kind == "head" and unit.layout.linears:
            after, before = self._share_head(unit.layout, after, before)
        lacking = comparable(after, before)
        for where, floats in (("as written", after), ("of the original", before)):
            lacking += [f"{name} {where} holds NaN or infinity" for name in _not_finite(floats)]
        if lacking:
            self.problems += [f"{x}: it cannot be compared" for x in lacking]
            return
        if unit.layout.kind == "embedding" and not self.original.arch.free:
            self._embedding(unit.layout, after, before)
            return
        made = None
        if unit.layout.kind == "block" and self.outputs is not None:
            made = self.outputs.block(
                unit, written=after, original=before, layout=layout, rotation=self.rotation
            )
        if unit.layout.name in self.trained:
            return
        schemes = self.written.schemes.linears
        comparison = UnitComparison(
            unit=unit.layout,
            written=after,
            original=before,
            specs={x.name: s for x in unit.layout.linears if (s := schemes[x.name].weight)},
            dtype=self.written.checkpoint.dtype,
            rotation=self.rotation,
            deltas=self._differences(unit.layout),
        )
        del before  # what is moved or rounded takes its place
        self.differences += comparison.differences()
        if made is not None:
            self.blocks += made.judge(comparison.nearest())

    def _differences(self, layout: UnitLayout) -> dict[str, tuple[Tensor, int]]:
        """Base's weight and bits of each linear of a delta."""
        stored = ((x.name, self.subject.difference(x)) for x in layout.linears)
        return {
            name: (part[0].to(self.device, torch.float32), part[1])
            for name, part in stored
            if part is not None
        }

    def _floats(self, unit: Unit, experts: Mapping[str, CodedLater]) -> Floats:
        """A unit's weights in float32 on the device: experts', which are most of a block, get there
        when they are read, and no longer."""
        waiting = {x.weight_name for x in unit.layout.linears if x.expert is not None}
        floats: dict[str, Tensor | Packed] = {**experts}
        for name, tensor in unit.tensors.items():
            floats[name] = tensor if name in waiting else tensor.to(self.device, torch.float32)
        for path, packed in unit.quantized.items():
            floats[weight_name(path)] = packed.to(self.device).dequantize(torch.float32)
        return Floats(floats, device=self.device)

    def _share_head(
        self, layout: UnitLayout, after: Floats, before: Floats
    ) -> tuple[Floats, Floats]:
        """A tied head is the embedding's weight; where both are tied there is none to compare."""
        name = layout.linears[0].weight_name

        def shared(source: Source, floats: Floats, other: Floats) -> Floats:
            tied = source.layout.tied
            if name in floats or name not in other or tied is None:
                return floats
            read = source.checkpoint.read([tied])[tied]
            return floats.replaced({name: read.to(self.device, torch.float32)})

        return shared(self.written, after, before), shared(self.original, before, after)

    def _embedding(
        self, layout: UnitLayout, after: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        new, old = _joined(layout, after), _joined(layout, before)
        errors = _row_errors(new, old)
        moved = float(errors.median()) > ROTATED
        if moved:
            rotation = rotation_between(old, new)
            turned = _row_errors(new, old, rotation)
            if not float(turned.median()) <= UNRELATED:
                self._unrelated(
                    f"{self.original.checkpoint.folder.name} is not what {self.folder.name} was "
                    "made from: their embeddings have nothing in common, rotated or not"
                )
            if float(turned.median()) <= ROTATED:
                errors, self.rotation = turned, rotation
        floor = 2 * float_floor(self.written.checkpoint.dtype, moved=self.rotation is not None)
        beside = [name for name in layout.tensors if not _of_tokens(name, layout, after)]
        found = {layout.tensors[0]: errors}
        found |= {n: _row_errors(_rows(after[n]), _rows(before[n])) for n in beside}
        for name, off in found.items():
            bad = (~(off <= floor)).nonzero()[:, 0]
            if len(bad):
                self.problems.append(f"{name}: row {several(bad.tolist())} is not the original's")
        off = _row_distances(new, old, self.rotation).norm()
        error = float(off / old.norm(dim=1).norm().clamp(min=1e-30))
        self.differences.append(Difference(layout.tensors[0], error, max(error, floor)))
        try:
            self.outputs = Outputs(self.written, self.original, self.rows, device=self.device)
            self.outputs.embed(before, after, self.subject.ranks)
        except (InputError, ValueError, RuntimeError, IndexError) as error:
            self.outputs = None
            self.problems.append(f"the blocks' outputs cannot be compared: {error}")

    def _carried(self, unit: Unit) -> None:
        """What is no part of the text model is written as it was; one tensor is read at a time."""
        read, both = self.original.checkpoint, set(self.original.layout.carried)
        theirs = self._packed_beside(unit.layout)
        linears = {x.weight_name: x for x in unit.layout.linears if x.name in unit.quantized}
        coded = [x for name, x in linears.items() if name in both]
        if coded:
            self._rounded_beside(unit, coded, theirs)
        for name in (n for n in unit.layout.carried if n in both and n not in linears):
            ours = unit.extra[name]
            held = theirs[name].to(ours.dtype) if name in theirs else read.read([name])[name]
            if not torch.equal(ours.cpu(), held):
                self.problems.append(f"{name} is not the original's")

    def _packed_beside(self, layout: UnitLayout) -> dict[str, Tensor]:
        """Weights of a part beside the text model that the original has packed, by their names as
        floats."""
        original, schemes = self.original.layout, self.original.schemes.linears
        every = [x for x in original.linears if x.weight_name in layout.carried]
        packed = [x for x in every if schemes[x.name].weight]
        if not packed:
            return {}
        few = replace(layout, linears=tuple(packed), tensors=tuple(x.weight_name for x in packed))
        stored = self.original.checkpoint.read(self.original.names(few, carried=False))
        codes = self.original.assemble(few, stored).quantized
        return {x.weight_name: codes[x.name].dequantize() for x in packed}

    def _rounded_beside(
        self, unit: Unit, linears: list[Linear], theirs: Mapping[str, Tensor]
    ) -> None:
        """Linears of towers and the like, where they are packed."""

        def floats(read: Mapping[str, Tensor]) -> Floats:
            return Floats({name: t.to(self.device, torch.float32) for name, t in read.items()})

        plain = [x.weight_name for x in linears if x.weight_name not in theirs]
        comparison = UnitComparison(
            unit=replace(unit.layout, linears=tuple(linears)),
            written=floats({x.weight_name: unit.quantized[x.name].dequantize() for x in linears}),
            original=floats({**self.original.checkpoint.read(plain), **theirs}),
            specs={x.name: unit.quantized[x.name].spec for x in linears},
            dtype=self.written.checkpoint.dtype,
        )
        self.differences += comparison.differences()

    def _unrelated(self, problem: str) -> NoReturn:
        """Said at once: what it was made from has to be named before anything is compared."""
        self.found.add("the original", [problem], "")
        raise NothingMore

    def conclude(self) -> None:
        if self.subject.original is None:
            return
        for row in self.differences:
            name = row.name
            known = self.found.layers.get(name)
            if known is not None or name in self._linears():
                known = known or LayerVerdict(linear=name)
                self.found.layers[name] = replace(known, error=row.error)
        problems = self.problems + [p for row in self.differences if (p := row.problem)]
        self.found.add("error to the original", problems, self._weights_detail())
        self.found.blocks += [
            BlockVerdict(row.block, row.error, row.expected)
            for row in self.blocks
            if row.what == WHOLE
        ]
        if self.outputs is not None:
            wrong = [p for row in self.blocks if (p := row.problem)]
            self.found.add("outputs to the original", wrong, self._outputs_detail())

    def _linears(self) -> set[str]:
        return {linear.name for linear in self.written.layout.linears}

    def _weights_detail(self) -> str:
        names = self._linears()
        rows = [row for row in self.differences if row.name in names]
        packed = {x.name for unit in self.written.layout.units for x in self.subject.packed(unit)}
        coded = [x for x in rows if x.name in packed]
        middle = statistics.median(x.error for x in coded or rows) if rows else 0.0
        worst = sorted(rows, key=lambda row: -row.error)[:3]
        shown = ", ".join(f"{row.name} {row.error:.3g}" for row in worst)
        turned = "; the rotation of the stream was read off the embedding" if self.rotation else ""
        if self.trained:
            turned += f"; {len(self.trained)} blocks were trained anew and cannot be compared"
        return (
            f"{len(self.differences)} tensors; median {middle:.3g} of {len(coded or rows)} layers; "
            f"largest {shown}{turned}"
        )

    def _outputs_detail(self) -> str:
        assert self.outputs is not None
        worst = max((row.error for row in self.blocks), default=math.nan)
        blocks = len({row.block for row in self.blocks})
        return (
            f"{blocks} blocks on {self.outputs.text}, each from the original's own states; largest "
            f"error {worst:.2g}, none beyond rounding"
        )


def same_units(written: Source, original: Source) -> bool:
    """Whether the two have the same blocks, with linears of the same shapes."""
    one, other = (
        [
            (u.name, sorted((x.name, x.shape) for x in u.linears), u.attention)
            for u in s.layout.units
            if u.kind != "beside"
        ]
        for s in (written, original)
    )
    return one == other


def _not_finite(floats: Floats) -> Iterator[str]:
    """Names of tensors that hold NaN or infinity; what is not there in float32 is made for it, one
    after the other."""
    there = {name: floats[name] for name in floats if floats.holds(name)}
    yield from not_finite(there)
    for name in floats:
        if name not in there:
            yield from not_finite({name: floats[name]})


def _joined(layout: UnitLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """All rows of the embedding; no copy of the only tensor that most models have."""
    parts = [tensors[name] for name in layout.tensors if _of_tokens(name, layout, tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_tokens(name: str, layout: UnitLayout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the embedding has hidden states as rows."""
    return tensors[name].shape[1:] == tensors[layout.tensors[0]].shape[1:]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _row_errors(new: Tensor, old: Tensor, rotation: Matrix | None = None) -> Tensor:
    """Relative error of each row; rows of next to nothing count by the size of the others."""
    size = old.norm(dim=1)
    smallest = max(float(size.median()) * 1e-3, 1e-30)
    errors: Tensor = _row_distances(new, old, rotation) / size.clamp(min=smallest)
    return errors


def _row_distances(new: Tensor, old: Tensor, rotation: Matrix | None) -> Tensor:
    """Norm of each row's difference, some rows at a time: an embedding is a model's largest tensor,
    and is here twice already."""
    # Into one tensor: small ones that stay among large ones that go leave holes in the heap.
    found = torch.empty_like(new[:, 0])
    for start in range(0, len(new), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        moved = old[rows] if rotation is None else rotation.right(old[rows])
        found[rows] = (new[rows] - moved).norm(dim=1)
    return found
