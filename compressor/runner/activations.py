"""Hidden states on disk, shared between passes and runs: what is known is read, not computed again.

What leaves a block is named by a hash over all that it was made from: config, dtype, device,
versions, the rows, and the weights of every unit before it, in the batches that ran. So nothing has
to be declared invalid: another weight is another name. An entry is as many rows as its record says,
memory-mapped, and counts only once all of its bytes were held against their hash.

The folder is bounded. What no process of now has touched makes room for what is new, the oldest
first; where that does not do, nothing more is kept: of a walk that does not fit whole, its
beginning is worth more than its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.checkpoint.reader import content_hash
from compressor.checkpoint.records import stated_hash
from compressor.errors import InputError
from compressor.runner.simulate import stored_inputs

if TYPE_CHECKING:
    from compressor.runner.source_model import SourceModel

MARK = "CACHEDIR.TAG"
"""What marks the folder as one of ours, and as one that backups pass over."""

MARKED = b"Signature: 8a477f597d28d172789f06886806bc55\n# activation store of compressor\n"
LOCK = "lock"
FORM = 1
"""Raised when the same block makes other numbers of the same rows."""

UNSAID = ("quantization_config", "_name_or_path", "transformers_version")
"""Keys of config.json that change no forward pass."""


@dataclass(slots=True)
class Activations:
    """Entries of one folder.

    limit        bytes of all entries
    environment  what decides the last bits of a result beside the rows and the weights
    on_note      told once why nothing more is kept
    read, ran    rows that were read in place of running them through a block, and that ran
    """

    folder: Path
    limit: int
    environment: Mapping[str, Any]
    on_note: Callable[[str], None] = lambda text: None
    read: int = 0
    ran: int = 0
    full: bool = False
    _since: float = field(default_factory=time.time)

    @classmethod
    def open(cls, folder: Path, limit: int, environment: Mapping[str, Any]) -> Activations:
        """The store in a folder, which is made where it is not there, with what dead processes left
        half written taken away and its size within the limit.

        Raises InputError for a folder that is not ours, or cannot be written.
        """
        if (refused := refusal(folder)) is not None:
            raise refused
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).write_bytes(MARKED)
            store = cls(folder, limit, environment)
            with store._locked():
                for path in folder.glob("*.part"):
                    _remove_dead(path)
                store._make_room(0, before=time.time())
        except OSError as error:
            raise InputError(
                f"cannot write into the activation store {folder}: {error.strerror or error}",
                hint="activation_store.dir names a folder of your own",
            ) from error
        return store

    def rows(self, name: str | None) -> Tensor | None:
        """The entry of a name, [rows, length, hidden], mapped from the disk; None where there is
        none, or one whose bytes are not what was written, which is taken away."""
        if name is None:
            return None
        data, record = self._paths(name)
        try:
            about = json.loads(record.read_bytes())
            shape, dtype = about["shape"], getattr(torch, about["dtype"])
            size = shape[0] * shape[1] * shape[2]
            if data.stat().st_size != size * dtype.itemsize:
                raise ValueError("cut")
            flat = torch.from_file(str(data), shared=False, size=size, dtype=dtype)
            if hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest() != about["sha256"]:
                raise ValueError("damaged")
            os.utime(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError):
            self._drop(name)
            return None
        self.read += shape[0]
        return flat.view(shape)

    @contextmanager
    def keeping(
        self, name: str | None, batches: Sequence[int]
    ) -> Iterator[Callable[[Tensor], None]]:
        """A function that is given the rows of an entry in order, for the length of a `with`; after
        it the entry is there. There is none where something raises in the `with`, where rows came
        in other batches than these, or where the disk fails: then it is computed another time."""
        part = _Part(self.folder) if name is not None and not self.full else None
        came: list[int] = []

        def keep(rows: Tensor) -> None:
            self.ran += rows.shape[0]
            came.append(rows.shape[0])
            if part is not None:
                part.add(rows)

        try:
            yield keep
            if part is not None and name is not None and came == list(batches) and part.whole():
                self._admit(name, part)
        finally:
            if part is not None:
                part.close()
                if part.failed and not self.full:
                    self._stop(f"{self.folder}: {part.failed}")

    def _admit(self, name: str, part: _Part) -> None:
        data, record = self._paths(name)
        try:
            with self._locked():
                if not self._make_room(part.size, before=self._since):
                    self._stop(f"it holds {self.limit / 1e9:.3g} GB, all of them in use")
                    return
                record.unlink(missing_ok=True)
                os.replace(part.path, data)
                whole = record.with_suffix(".new")
                whole.write_text(json.dumps(part.about()))
                os.replace(whole, record)
        except OSError as error:
            self._stop(f"{self.folder}: {error.strerror or error}")

    def _stop(self, why: str) -> None:
        self.full = True
        self.on_note(f"the activation store takes no more: {why}")

    def _make_room(self, size: int, *, before: float) -> bool:
        """Take away the oldest entries that nobody touched since a time, until so many bytes more
        are within the limit; whether they are."""
        entries = []
        for data in self.folder.glob("*.bin"):
            try:
                found = data.stat()
            except FileNotFoundError:
                continue
            entries.append((found.st_mtime, found.st_size, data.stem))
        total = size + sum(entry[1] for entry in entries)
        for touched, taken, name in sorted(entries):
            if total <= self.limit or touched >= before:
                break
            self._drop(name)
            total -= taken
        return total <= self.limit

    def _drop(self, name: str) -> None:
        for path in self._paths(name)[::-1]:
            path.unlink(missing_ok=True)

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.bin", self.folder / f"{name}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Part:
    """An entry while it is written, locked as long as its writer lives."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{os.getpid()}.{time.monotonic_ns()}.part"
        self.failed = ""
        self.size = 0
        self._hash = hashlib.sha256()
        self._rows = 0
        self._like: Tensor | None = None
        try:
            self._file = self.path.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            self.failed = error.strerror or str(error)

    def add(self, rows: Tensor) -> None:
        """The next rows, [n, length, hidden]."""
        if self.failed:
            return
        ready = rows.detach().cpu().contiguous()
        data = memoryview(ready.view(torch.uint8).numpy().reshape(-1))
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.failed = error.strerror or str(error)
        self._rows, self._like = self._rows + ready.shape[0], ready[:0]
        self.size += len(data)

    def whole(self) -> bool:
        """Whether all that was added is in the file."""
        try:
            if not self.failed:
                self._file.flush()
        except OSError as error:
            self.failed = error.strerror or str(error)
        return not self.failed and self._like is not None

    def about(self) -> dict[str, Any]:
        """What its record says."""
        assert self._like is not None
        return {
            "shape": [self._rows, *self._like.shape[1:]],
            "dtype": str(self._like.dtype).removeprefix("torch."),
            "sha256": self._hash.hexdigest(),
        }

    def close(self) -> None:
        """Nothing is left of it but what was admitted."""
        try:
            if hasattr(self, "_file"):
                self._file.close()
        except OSError as error:
            self.failed = self.failed or error.strerror or str(error)
        self.path.unlink(missing_ok=True)


def _remove_dead(part: Path) -> None:
    """Take away what a process that is no more was writing."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return


def refusal(folder: Path) -> InputError | None:
    """Why a folder cannot be a store: it is a file, or holds what is not ours."""
    hint = "activation_store.dir names a folder that is new, or was made by this program"
    if folder.exists() and not folder.is_dir():
        return InputError(f"the activation store {folder} is a file", hint=hint)
    try:
        if folder.is_dir() and not (folder / MARK).is_file() and any(folder.iterdir()):
            return InputError(
                f"{folder} is not empty and is no activation store: files in it would be taken for "
                "old entries",
                hint=hint,
            )
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            return InputError(f"cannot write into {above}: Permission denied", hint=hint)
    except OSError as error:
        return InputError(f"cannot read {folder}: {error.strerror or error}", hint=hint)
    return None


def lacking(folder: Path, limit: int) -> str | None:
    """A note where the disk has less left than the store may take."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    free += sum(path.stat().st_size for path in folder.glob("*.bin"))
    if free >= limit:
        return None
    return (
        f"the activation store may take {limit / 1e9:.3g} GB, and {above} has {free / 1e9:.3g} GB "
        "left: what does not fit is computed again"
    )


def nowhere(rows: Tensor) -> None:
    """Keeps nothing."""


def even(rows: int, batch: int) -> list[int]:
    """Sizes of batches where memory does."""
    return [min(batch, rows - start) for start in range(0, rows, batch)]


def embedded(
    model: SourceModel, tensors: Mapping[str, Tensor], ids: Tensor, side: Mapping[str, Tensor]
) -> str | None:
    """The name of what enters a model's first block; None where nothing is kept."""
    if model.activations is None:
        return None
    return stated_hash(
        [
            FORM,
            dict(model.activations.environment),
            {key: value for key, value in model.config.items() if key not in UNSAID},
            repr(model.source.arch.runtime),
            str(model.dtype),
            kind := model.device.type,
            *(["autocast"] if torch.is_autocast_enabled(kind) or model.quick else []),
            _content(tensors),
            _content({"ids": ids, **{f"side.{name}": tensor for name, tensor in side.items()}}),
        ]
    )


def after(
    model: SourceModel,
    made_of: str | None,
    index: int,
    tensors: Mapping[str, Tensor],
    batches: Sequence[int],
    *,
    attention: str = "",
) -> str | None:
    """The name of what leaves a unit; None where what enters has none.

    made_of    the name of what enters;  index  of the unit
    tensors    the weights it runs with;  batches  sizes of those that run, which may round
    attention  what stands for the model's own attention, in words that decide all of it
    """
    if model.activations is None or made_of is None:
        return None
    beside: list[Any] = [attention]
    if model.as_stored:
        unit = model.layout.unit(index)
        beside += [
            [name, repr(stored.spec), None if stored.scale is None else stored.scale.tolist()]
            for name, stored in stored_inputs(model.source, unit).items()
        ]
        if model.source.schemes.kv is not None:
            # Its scales are read with the block, not with its weights.
            return None
    return stated_hash([made_of, index, _content(tensors), list(batches), beside])


def _content(tensors: Mapping[str, Tensor]) -> str:
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in here.items()]
    return stated_hash([sorted(shapes), content_hash(here)])
