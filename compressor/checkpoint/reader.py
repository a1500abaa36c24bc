"""A checkpoint folder as a source: config, headers, and reads of named tensors."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.hashed_reads import hash_of_bytes, pieces, read_hashed
from compressor.checkpoint.lfs import is_pointer, lost_link, pointer_error
from compressor.checkpoint.safetensors import Entry, read_header, read_tensor
from compressor.errors import CompressError, InputError, Problems, several
from compressor.foreign.untrusted import parse_json, read_file
from compressor.ir.layout import weight_name
from compressor.ir.tensor import dtype_of_most

POLICY_TENSORS = "attention_policy.safetensors"
"""Gates and scores of an attention policy: no weights of the model, and they go where it goes."""
STEM = "model"
INDEX_NAME = f"{STEM}.safetensors.index.json"
SINGLE_NAME = f"{STEM}.safetensors"
DIFFUSION = "diffusion_pytorch_model"
"""What diffusers has in place of `model`."""
ADAPTER_NAME = "adapter_config.json"
NO_FOLDER = "name a checkpoint's folder; hf download ORG/NAME --local-dir FOLDER fetches one"
NO_TOKENIZER = "no_tokenizer.json"
"""In the folder of a converted model: why it has no tokenizer, {"message", "hint"}."""
PICKLES = ("pytorch_model*.bin", "consolidated*.pth")
UNFINISHED = (".cache/huggingface/download/*.incomplete", "*.incomplete", "*.part", "*.aria2")
"""What downloads leave where they end early."""
READ_THREADS = min(16, max(4, 3 * (os.cpu_count() or 1) // 4))
"""A thread hashes 1.2 GB/s: sixteen read and hash 11.9 GB/s of what memory holds, eight 6.8."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: nothing but headers has been read, and no file is kept open.

    problems   what is wrong with its files, where it was opened to be planned with nevertheless
    notes      what of the folder is left out or read otherwise than it says, a sentence each
    stored_as  what weights that are read as floats are stored as, in a few words; empty for floats
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    problems: tuple[CompressError, ...] = field(default=(), kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    stored_as: str = field(default="", kw_only=True)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape."""
        return {name: entry.spec.shape for name, entry in self.entries.items()}

    @property
    def stem(self) -> str:
        """What the files of its weights are called."""
        files = {entry.file.name for entry in self.entries.values()}
        return DIFFUSION if all(name.startswith(DIFFUSION) for name in files) else STEM

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: the config's, else that of most bytes."""
        named = self.config.get("dtype", self.config.get("torch_dtype"))
        known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if isinstance(named, str) and named in known:
            return known[named]
        specs = (entry.spec for entry in self.entries.values())
        return dtype_of_most(x for x in specs if x.dtype in known.values()) or torch.bfloat16

    def running_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype in which the model runs: its own on a GPU, where it is fast; float32 on a CPU."""
        return self.dtype if device.type == "cuda" else torch.float32

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = READ_THREADS
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError for a name that is not there."""
        entries = {name: self.entry(name) for name in names}
        with ThreadPoolExecutor(threads) as pool:
            read = pool.map(lambda entry: read_tensor(entry, pin=pin), entries.values())
            return dict(zip(entries, read, strict=True))

    def read_hashed(
        self, names: Iterable[str], *, pin: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`read`, and the SHA-256 of each tensor's bytes: of what files hold, while it is read."""
        entries = {name: self.entry(name) for name in names}
        return read_hashed(entries, pin=pin, threads=READ_THREADS)

    def pieces(self, names: Iterable[str]) -> list[int]:
        """Bytes of each piece of memory that `read_hashed` takes for the named tensors."""
        return pieces({name: self.entry(name) for name in names})

    def in_files(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """What files hold of the named tensors, as they hold it and under the names there."""
        return self.read(names, pin=pin)

    def view(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors out of that."""
        return {name: stored[name] for name in names}

    def stored_entries(self) -> list[Entry]:
        """Where files hold what this is read from."""
        return [*self.entries.values()]

    def entry(self, name: str) -> Entry:
        """Header entry of one tensor."""
        try:
            return self.entries[name]
        except KeyError:
            raise InputError(f"the checkpoint has no tensor {name!r}") from None


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and the bytes of `tensors`, in order of name."""
    return hash_of(digests_of(tensors))


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(tensors, pool.map(hash_of_bytes, tensors.values()), strict=True))


def hash_of(digests: Mapping[str, str]) -> str:
    """The `content_hash` of tensors with these digests."""
    lines = [f"{name} {digests[name]}" for name in sorted(digests)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_json(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object from a file a stranger wrote. Raises InputError."""
    data = read_file(path, what=what)
    try:
        value = parse_json(data)
    except ValueError as error:
        if is_pointer(path):
            raise pointer_error(path.name) from error
        raise InputError(f"{what} {path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path.name} is not a JSON object")
    return value


def open_checkpoint(folder: Path, *, to_plan: bool = False) -> Checkpoint:
    """Open a checkpoint folder: config.json, the index (if any) and every shard's header.

    to_plan  a tensor that a shard lacks, or whose shard is missing, is taken to be like that of
             another layer, and what is wrong is left to the plan, which lists it with all else
    Raises InputError, or Problems with all that is wrong: a missing or damaged shard, an index
    that points outside the folder or names a tensor its shard does not have.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint=NO_FOLDER)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json", hint=_what_it_is(folder))
    config = load_json(folder / "config.json", what="config")
    index = folder / index_name(stem_of(folder))
    if not (to_plan and index.is_file()):
        entries = read_entries(folder)
        notes = other_weights(folder, entries, indexed=index.is_file())
        return Checkpoint(folder=folder, config=config, entries=entries, notes=notes)
    named = load_json(index, what="index")
    entries, problems = _indexed_entries(folder, named)
    notes = ()
    try:
        notes = other_weights(folder, entries, indexed=True)
    except InputError as error:
        problems.append(error)
    known = {_any_layer(name): entry for name, entry in entries.items()}
    for name in named["weight_map"]:
        if name not in entries and (like := _like(name, known)) is not None:
            entries[name] = like
    if problems and len(entries) < len(named["weight_map"]):
        raise Problems(problems)
    return Checkpoint(
        folder=folder, config=config, entries=entries, problems=tuple(problems), notes=notes
    )


def stem_of(folder: Path) -> str:
    """What the files of a folder's weights are called."""
    plain = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    names = (f"{DIFFUSION}.safetensors", index_name(DIFFUSION))
    return DIFFUSION if not plain and any((folder / name).is_file() for name in names) else STEM


def index_name(stem: str) -> str:
    """The index of such files."""
    return f"{stem}.safetensors.index.json"


def component_of(folder: Path) -> Path | None:
    """The folder of a diffusion pipeline's largest model; None where it is no pipeline."""
    if not (folder / "model_index.json").is_file():
        return None
    parts = (folder / name for name in ("transformer", "unet"))
    return next((part for part in parts if (part / "config.json").is_file()), None)


def _what_it_is(folder: Path) -> str:
    """What to name in place of a folder that is no checkpoint."""
    if (lost := lost_link(folder)) is not None:
        return lost
    if (folder / ADAPTER_NAME).is_file():
        return (
            "it holds an adapter, not a model: merge it into its base first (peft: "
            "merge_and_unload, save_pretrained)"
        )
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"it holds GGUF files: name one, {folder / files[0]}"
    if snapshots := sorted(path.parent.name for path in folder.glob("snapshots/*/config.json")):
        return f"it is an entry of the Hub's cache: name {folder / 'snapshots' / snapshots[-1]}"
    if (part := component_of(folder)) is not None:
        return f"it is a diffusion pipeline: model: {{path: {part}, map: none}} rounds weights"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"name {folder / inner[0]}" if inner else "name the folder of a Hugging Face checkpoint"


def other_weights(folder: Path, entries: Mapping[str, Entry], *, indexed: bool) -> tuple[str, ...]:
    """Notes on weight files beside those that `entries` lie in.

    Raises InputError where loaders would not all read the same weights: transformers takes
    model.safetensors before an index, vLLM what an index names and without one every file; and an
    adapter beside a model is applied by one and not by the other.
    """
    used, stem = {entry.file.name for entry in entries.values()}, stem_of(folder)
    known = {*used, POLICY_TENSORS}
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in known)
    if indexed and (folder / SINGLE_NAME).is_file() and used - {SINGLE_NAME}:
        named = ", ".join(sorted(used - {SINGLE_NAME})[:2])
        raise InputError(
            f"{folder} holds two sets of weights: {SINGLE_NAME}, which transformers loads, and "
            f"{INDEX_NAME} with {named}, which vLLM loads",
            hint=f"keep one: delete {SINGLE_NAME}, or {INDEX_NAME} and its shards",
        )
    if unfinished := [name for name in sorted(used) if (folder / f"{name}.aria2").exists()]:
        raise InputError(
            f"{unfinished[0]} is not downloaded to its end: {unfinished[0]}.aria2 is beside it",
            hint="the same download continues; the file has its full size from its beginning on",
        )
    if (folder / ADAPTER_NAME).is_file():
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER_NAME}) beside a whole model: transformers "
            "applies it where peft is installed, vLLM does not",
            hint="merge it first (peft: merge_and_unload, save_pretrained), or move its files away",
        )
    if not indexed and stem == STEM:
        for name in others:
            twice = _names_in(folder / name) & entries.keys()
            if twice:
                raise InputError(
                    f"{folder} holds two sets of weights: {min(twice)} is in {SINGLE_NAME}, which "
                    f"transformers loads, and in {name}, which vLLM loads too",
                    hint=f"keep one: move {name} away, or {SINGLE_NAME}",
                )
    others += sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not others:
        return ()
    read = index_name(stem) if indexed else f"{stem}.safetensors"
    return (f"weights are those of {read}; left out: {several(others, 3)}",)


def _names_in(file: Path) -> AbstractSet[str]:
    try:
        return read_header(file).keys()
    except InputError:
        return frozenset()


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _like(name: str, known: Mapping[str, Entry]) -> Entry | None:
    """An entry of the shape that a tensor should have: another layer's, the embedding's for the
    head and the other way round, the widest norm's for the last norm.

    known  by name, with layers' numbers left out
    """
    ends = (weight_name("embed_tokens"), weight_name("lm_head"))
    if (same := known.get(_any_layer(name))) is not None:
        return same
    if name.endswith(ends):
        return next((entry for other, entry in known.items() if other.endswith(ends)), None)
    norms = [entry for other, entry in known.items() if "norm" in other and "norm" in name]
    return max(norms, key=lambda entry: entry.spec.shape, default=None)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Header entries of every tensor of a folder's checkpoint."""
    stem = stem_of(folder)
    index = folder / index_name(stem)
    if index.is_file():
        entries, problems = _indexed_entries(folder, load_json(index, what="index"))
        if problems:
            raise Problems(problems)
        return entries
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return read_header(single)
    pickles = sorted(
        p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    )
    if pickles:
        raise InputError(
            f"{folder} holds only pickled weights ({pickles[0]}), which are never loaded",
            hint="convert them once, where you trust the source: "
            f"compress convert --unpickle {folder} NEW_FOLDER",
        )
    kinds = (f"{each}-*-of-*.safetensors" for each in (STEM, DIFFUSION))
    shards = sorted(p.name for kind in kinds for p in folder.glob(kind))
    if shards:
        raise InputError(
            f"{folder} has shards but no {index_name(shards[0].partition('-')[0])}",
            hint="download the index file too; without it a missing shard cannot be noticed",
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint=NO_FOLDER)
    begun = [p.name for pattern in UNFINISHED for p in folder.glob(pattern)]
    what = "a download did not finish; " if begun else ""
    raise InputError(
        f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}",
        hint=lost_link(folder)
        or f"{what}download the model's weights: hf download ORG/NAME --local-dir {folder}",
    )


def _indexed_entries(
    folder: Path, index: Mapping[str, Any]
) -> tuple[dict[str, Entry], list[CompressError]]:
    """Entries of the tensors that are there, and what is wrong with the shards."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{INDEX_NAME} has no weight_map")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain:
            raise InputError(
                f"{INDEX_NAME} sends {name!r} to {file!r}, which is not a .safetensors file in the "
                "same folder"
            )
    problems: list[CompressError] = []
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            count = sum(f == file for f in weight_map.values())
            hint = lost_link(folder) or "download it again"
            problems.append(InputError(f"shard {file} is missing ({count} tensors)", hint=hint))
            continue
        try:
            headers[file] = read_header(folder / file)
        except InputError as error:
            problems.append(error)
    entries: dict[str, Entry] = {}
    for name, file in weight_map.items():
        if file in headers:
            if name in headers[file]:
                entries[name] = headers[file][name]
            else:
                problems.append(
                    InputError(f"{INDEX_NAME} sends {name!r} to {file}, which lacks it")
                )
    stray = [n for header in headers.values() for n in header if n not in weight_map]
    if stray:
        problems.append(
            InputError(
                f"{len(stray)} tensors are not in {INDEX_NAME}, first {stray[0]!r}",
                hint="the index belongs to other files: download both again, or save the model "
                "once more with save_pretrained",
            )
        )
    return entries, problems
