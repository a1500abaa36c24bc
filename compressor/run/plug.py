"""A tuned adapter put into its full model, and an adapter taken out of one.

Outside the adapter every byte stays: the full model's files are written with the same headers, so a
file in which nothing was tuned has the same hash.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint.adapter import Adapter, AdapterTarget, of_emulator
from compressor.checkpoint.as_stored import StoredTarget
from compressor.checkpoint.find import Located
from compressor.checkpoint.numbered import require_alike
from compressor.checkpoint.offsite import (
    OffsiteRecord,
    adapter_names,
    check_pads,
    fingerprint,
    read_offsite_record,
    stored,
)
from compressor.checkpoint.reader import content_hash, read_entries
from compressor.checkpoint.records import stated_hash
from compressor.checkpoint.safetensors import read_tensor
from compressor.checkpoint.source import Source, not_finite
from compressor.checkpoint.transaction import Progress, write
from compressor.errors import CompressError, InputError, Problems, several
from compressor.ir.layout import UnitLayout
from compressor.ir.unit import Unit
from compressor.run.environment import versions

UNRECORDED = "nothing says which model it was tuned for: names and shapes alone were compared"


@dataclass(frozen=True, slots=True)
class Plugged:
    """A finished model, or an adapter.

    tensors  how many were put in or taken out;  nbytes  of all files of tensors
    notes    what its user should know;  already  the same was finished before
    """

    output: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()
    already: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": True,
            "output": str(self.output),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "notes": list(self.notes),
            "already_done": self.already,
        }


def plug(
    located: Located,
    adapter: Adapter,
    output: Path,
    *,
    progress: Progress = lambda name, done, total: None,
) -> Plugged:
    """Write the full model with a tuned adapter into `output`, a new folder.

    Raises InputError, or Problems with every tensor that is wrong, before anything is written: an
    adapter of another model, tensors that are missing, left over, misshapen or not finite, and
    tuned ones outside the adapter.
    """
    source = _floats(located.source)
    known = _known_base(source, adapter, progress)
    notes = [] if adapter.record is not None else [UNRECORDED]
    own = adapter_names(source, adapter.pads)
    entries = stored(source).entries
    expected = {name: entries[name].spec.shape for name in own}
    if adapter.added:
        expected = {name: shape for name, shape in expected.items() if name in adapter.shapes}
    require_alike(adapter.shapes, expected, what=adapter.what)
    problems: list[CompressError] = [*_tuned_beside(source, adapter)]
    made: dict[str, Tensor] = {}
    rounded = 0
    for name in expected:
        try:
            made[name], other = _fitted(source, adapter, name)
            rounded += other
        except InputError as error:
            problems.append(error)
    if problems:
        raise Problems(problems)
    if moved := _tuned_middle(source, adapter):
        notes.append(
            f"the emulator's middle was tuned, too ({several(moved)}), which "
            "is not put in: freeze it, or what was learned there is lost"
        )
    if rounded:
        dtype = str(source.checkpoint.dtype).removeprefix("torch.")
        notes.append(f"{rounded} tensors were rounded to the model's dtype, {dtype}")
    folder = source.checkpoint.folder
    raw = read_entries(folder)
    at = {(e.file.name, e.begin): name for name, e in raw.items()}
    new = {at[entries[n].file.name, entries[n].begin]: tensor for n, tensor in made.items()}

    def read(part: UnitLayout) -> Unit:
        tensors = {n: new[n] if n in new else read_tensor(raw[n]) for n in part.tensors}
        return Unit(layout=part, tensors=tensors)

    written = write(
        StoredTarget(folder, raw),
        output,
        read,
        about={
            "plug": {"adapter": content_hash(made), "pads": list(adapter.pads)},
            "base": {
                **located.identity,
                "fingerprint": known,
                "headers": stated_hash(sorted([n, e.file.name, e.begin] for n, e in raw.items())),
            },
            "versions": versions(),
        },
        beside=folder,
        files={"config.json": (folder / "config.json").read_bytes()},
        progress=progress,
    )
    return Plugged(output, len(made), written.shards.size, tuple(notes), written.finished)


def unplug(
    located: Located,
    output: Path,
    *,
    pads: tuple[int, int] | None = None,
    emulator: Path | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Plugged:
    """Write the adapter of a full model, or of a tuned emulator, into `output`, a new folder, under
    the full model's names.

    pads      blocks at both ends of a full model
    emulator  folder with the record of a tuned emulator that has none beside it
    Raises InputError, or Problems, before anything is written.
    """
    source = located.source
    folder = source.checkpoint.folder
    record = read_offsite_record(emulator or folder)
    if record is not None and len(record.kept) < record.blocks:
        if pads is not None and pads != record.pads:
            raise InputError(
                f"{folder} is an emulator with pads of {record.pads[0]} and {record.pads[1]} blocks"
            )
        names = [source.arch.layer.format(i=i) for i in range(record.blocks)]
        adapter = of_emulator(source, names, record)
        found = {name: adapter.read(name) for name in adapter.shapes}
    else:
        if pads is None:
            raise InputError(
                f"{folder} does not say which blocks are its adapter",
                hint="--pads 2,2 says how many of the first and last; an emulator's folder with "
                "offsite.json says so itself",
            )
        blocks = len(_floats(source).layout.blocks)
        try:
            check_pads(blocks, pads)
        except ValueError as error:
            raise InputError(f"--pads: {error}") from error
        record = OffsiteRecord(
            base="@".join(v for k, v in located.identity.items() if k in ("name", "revision")),
            model_type=source.layout.model_type,
            blocks=blocks,
            pads=pads,
            kept=tuple(range(blocks)),
            fingerprint=fingerprint(source, pads, progress=progress),
        )
        found = stored(source).read(adapter_names(source, pads))
    if bad := not_finite(found):
        raise Problems([InputError(f"{name} holds NaN or infinity") for name in bad])
    target = AdapterTarget.of(found, record)
    written = write(
        target,
        output,
        lambda unit: Unit(layout=unit, tensors=found),
        about={
            "unplug": {"adapter": content_hash(found), "record": stated_hash(record.to_json())},
            "versions": versions(),
        },
        beside=None,
        models=[folder],
        progress=progress,
    )
    return Plugged(output, len(found), written.shards.size, already=written.finished)


def _floats(source: Source) -> Source:
    if source.low_precision:
        raise InputError(
            f"{source.checkpoint.folder} holds {source.low_precision}, not floats",
            hint="plug into the original weights, and quantize what comes of it",
        )
    if source.arch.free:
        raise InputError("only models with an architecture map have an adapter")
    return source


def _known_base(source: Source, adapter: Adapter, progress: Progress) -> str:
    """The model's fingerprint. Raises InputError where the adapter was tuned for another one."""
    record, layout = adapter.record, source.layout
    blocks, where = len(layout.blocks), source.checkpoint.folder

    def other(why: str) -> InputError:
        assert record is not None
        return InputError(
            f"{adapter.what} is not an adapter of {where}: {why}",
            hint=f"it was tuned for {record.base} (fingerprint {record.fingerprint[:12]})",
        )

    if record is not None and (record.model_type, record.blocks) != (layout.model_type, blocks):
        raise other(
            f"it is of a {record.model_type} of {record.blocks} blocks, this is a "
            f"{layout.model_type} of {blocks}"
        )
    try:
        check_pads(blocks, adapter.pads)
    except ValueError as error:
        raise InputError(f"{adapter.what}: {error}") from error
    found = fingerprint(source, adapter.pads, progress=progress)
    if record is not None and found != record.fingerprint:
        raise other("what lies outside the adapter has other values")
    return found


def _tuned_beside(source: Source, adapter: Adapter) -> Iterator[InputError]:
    """What was tuned though it is no part of the adapter: it would be lost."""
    entries, tied = stored(source).entries, source.layout.tied
    for name, read in adapter.beside.items():
        tensor = read()
        if name not in entries:
            yield InputError(
                f"{adapter.what}: the model has no place for {name}",
                hint=f"its head shares {tied}: keep both frozen" if tied else None,
            )
            continue
        if _moved(source, name, tensor):
            shared = " (which the head shares)" if name == tied else ""
            yield InputError(
                f"{adapter.what}: {name}{shared} was tuned, but belongs to no block of the adapter",
                hint="freeze embeddings, final norm and head while the emulator is tuned, or put "
                "the model's own back",
            )


def _tuned_middle(source: Source, adapter: Adapter) -> list[str]:
    """Names of tensors of the middle that are the full model's no more."""
    entries = stored(source).entries
    found = ((name, read) for name, read in adapter.middle.items() if name in entries)
    return [name for name, read in found if _moved(source, name, read())]


def _moved(source: Source, name: str, tensor: Tensor) -> bool:
    own = stored(source).read([name])[name]
    return tensor.shape != own.shape or not bool((tensor.to(own.dtype) == own).all())


def _fitted(source: Source, adapter: Adapter, name: str) -> tuple[Tensor, bool]:
    """A tuned tensor in the dtype that the model has it in, and whether that rounded it."""
    spec = stored(source).entries[name].spec
    tensor = adapter.read(name)
    if adapter.added:
        tensor = stored(source).read([name])[name].float() + tensor
    if not_finite({name: tensor}):
        raise InputError(
            f"{adapter.what}: {name} holds NaN or infinity after tuning",
            hint="tune again with a lower learning rate, or in bfloat16 or float32",
        )
    made = tensor.to(spec.dtype).contiguous()
    if not_finite({name: made}):
        raise InputError(f"{adapter.what}: {name} holds values beyond the range of {spec.dtype}")
    return made, not adapter.added and bool((made.to(tensor.dtype) != tensor).any())
