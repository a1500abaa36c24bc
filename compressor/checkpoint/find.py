"""From what a recipe calls `model` to a checkpoint: a folder, a GGUF file, or a Hub repository.

Of a Hub repository only the weights of its index, their side files and what a config names are
ever fetched, at a revision that is pinned to a commit before anything else is read.
"""

import difflib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import torch

from compressor.arch.load import NO_MAP
from compressor.checkpoint.consolidated import open_any
from compressor.checkpoint.gguf.source import CONVERSION, convert_gguf
from compressor.checkpoint.lfs import is_pointer, pointer_error
from compressor.checkpoint.manifest import MANIFEST_NAME, RECIPE_NAME
from compressor.checkpoint.one_reading import BESIDE
from compressor.checkpoint.reader import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    component_of,
    load_json,
    open_checkpoint,
)
from compressor.checkpoint.safetensors import DTYPES, Entry
from compressor.checkpoint.side_files import SideFiles, select, shard_names, side_files
from compressor.checkpoint.source import Source, as_source
from compressor.errors import InputError, MachineError, Problems
from compressor.foreign.untrusted import read_file
from compressor.ir.tensor import TensorShape

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
FETCHED = (
    *("config.json", INDEX_NAME, SINGLE_NAME, "README.md", MANIFEST_NAME, RECIPE_NAME),
    *BESIDE,
)
"""Files of a Hub repository that come here, if it has them, beside side files and shards."""
GGUF_CACHE = "gguf-2"
"""Folder of converted GGUF files; another one whenever the conversion changes."""
SNAPSHOT = re.compile(r"models--(?P<repo>.+)/snapshots/(?P<commit>[0-9a-f]{40})")
"""How the Hub's cache names a folder that holds a model."""


@dataclass(frozen=True, slots=True)
class Located:
    """A model that was found.

    source    its checkpoint; only headers are known where `local` is false
    identity  what it is called in records: no path of this machine
    local     its weights are on this machine
    beside    which of its files go along with the weights
    """

    source: Source
    identity: dict[str, str]
    local: bool = True
    beside: SideFiles = field(default_factory=SideFiles)


def name_folder(folder: Path) -> dict[str, str]:
    """What to call a folder in records: by its last name, or by the repository and commit of
    which it is a snapshot in the Hub's cache."""
    path = folder.expanduser().resolve()
    snapshot = SNAPSHOT.search(path.as_posix())
    if snapshot is None or not path.as_posix().endswith(snapshot[0]):
        return {"name": path.name}
    return {"name": snapshot["repo"].replace("--", "/", 1), "revision": snapshot["commit"]}


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/compressor, or ~/.cache/compressor."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compressor"


def locate(
    model: str,
    *,
    fetch: bool,
    to_plan: bool = False,
    dtype: torch.dtype | None = None,
    chosen: str | None = None,
) -> Located:
    """Find a model; with `fetch`, a Hub repository's weights are downloaded too.

    to_plan  leaves what is wrong with a folder's shards to the plan, as `open_checkpoint` does
    dtype    what quantized weights that are read as floats become; None: the model's own
    chosen   the map: none, or a file; None: that of the model's type
    Raises InputError for what is not there or may not be read, MachineError for a failing network.
    """
    path, read = Path(model).expanduser(), partial(as_source, dtype=dtype, chosen=chosen)
    if chosen == NO_MAP and not (path / "config.json").is_file():
        path = component_of(path) or path
    if path.is_dir():
        checkpoint = open_any(path, to_plan=to_plan)
        try:
            found = read(checkpoint)
        except InputError as error:
            if not checkpoint.problems:
                raise
            raise Problems([*checkpoint.problems, error]) from error
        return Located(found, name_folder(path), beside=side_files(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{model} is a file, but not a GGUF file",
                hint="name the checkpoint's folder, a .gguf file or a Hub id",
            )
        if is_pointer(path):
            raise pointer_error(path.name)
        return _gguf(path, dtype, chosen)
    looks_local = model.startswith(("/", "./", "../", "~")) or path.suffix.lower() == ".gguf"
    if looks_local or not HUB_ID.fullmatch(model):
        raise InputError(
            f"there is no model at {model}",
            hint="a model is a checkpoint folder, a GGUF file or a Hub id: org/name@revision",
        )
    repo, _, revision = model.partition("@")
    return _hub(repo, revision or None, read, fetch=fetch, to_plan=to_plan)


def _gguf(path: Path, dtype: torch.dtype | None, chosen: str | None) -> Located:
    """A GGUF file, converted once and kept under its content's hash and the dtype asked for."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    asked = "own" if dtype is None else str(dtype).removeprefix("torch.")
    folder = cache_folder() / GGUF_CACHE / f"{digest[:32]}-{asked}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert_gguf(path, folder, dtype=dtype)
    identity = {"name": path.name, "gguf_sha256": digest}
    checkpoint = open_checkpoint(folder)
    said = load_json(folder / CONVERSION, what="record of the conversion").get("notes", [])
    notes = (*checkpoint.notes, *map(str, said))
    return Located(as_source(replace(checkpoint, notes=notes), chosen=chosen), identity)


def _cached(repo: str, revision: str | None, read: Callable[[Checkpoint], Source]) -> Located:
    """A repository from the Hub's cache, where HF_HUB_OFFLINE keeps from the network."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        found = open_checkpoint(folder)
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is not a Hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, InputError) as error:
        said = error.message if isinstance(error, InputError) else "nothing of it is there"
        here = None if isinstance(error, InputError) else _missing_here(repo)
        raise here or InputError(
            f"{repo} is not whole in the Hub's cache, and HF_HUB_OFFLINE is set: {said}",
            hint=f"download it where there is a network: hf download {repo}",
        ) from error
    identity = {"name": repo, "revision": folder.name}
    return Located(read(found), identity, beside=side_files(folder))


def _hub(
    repo: str,
    revision: str | None,
    read: Callable[[Checkpoint], Source],
    *,
    fetch: bool,
    to_plan: bool,
) -> Located:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, read)
    api = HfApi()
    with _hub_errors(repo, revision):
        info = api.model_info(repo, revision=revision)
        commit, names = info.sha, [file.rfilename for file in info.siblings or ()]
        assert commit is not None
        identity = {"name": repo, "revision": commit}
        if fetch:
            folder, beside = _fetch(repo, commit, names)
            return Located(read(open_checkpoint(folder)), identity, beside=beside)
        folder = Path(api.hf_hub_download(repo, "config.json", revision=commit)).parent
        known = {"config.json": read_file(folder / "config.json", what=f"config of {repo}")}
        beside = select(names, read=known.get)
        if to_plan:
            # With the tokenizer, which a plan tries.
            folder, beside = _fetch(repo, commit, names, weights=False)
        found = api.get_safetensors_metadata(repo, revision=commit)
    config = load_json(folder / "config.json", what=f"config of {repo}")
    if "quantization_config" not in config:
        for name in BESIDE.keys() & set(names):
            with _hub_errors(repo, revision):
                said_in = Path(api.hf_hub_download(repo, name, revision=commit))
            said = BESIDE[name](load_json(said_in, what=f"{name} of {repo}"))
            config["quantization_config"] = said
    entries: dict[str, Entry] = {}
    for file, metadata in found.files_metadata.items():
        for name, tensor in metadata.tensors.items():
            entries[name] = _entry(file, name, tensor)
    checkpoint = Checkpoint(folder=folder, config=config, entries=entries)
    return Located(read(checkpoint), identity, local=False, beside=beside)


def _fetch(
    repo: str, commit: str, names: list[str], *, weights: bool = True
) -> tuple[Path, SideFiles]:
    """Download a checkpoint and its side files: first what says which others are needed."""
    from huggingface_hub import snapshot_download

    there = {name for name in names if weights or not name.endswith(".safetensors")}
    asked = {*FETCHED, *select(names, read=lambda name: None).carried}

    def read(name: str) -> bytes | None:
        if name in there:
            asked.add(name)
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    while True:
        patterns = [escape(name) for name in sorted(asked & there)]
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
        before = len(asked)
        beside = select(names, read=read)
        asked |= shard_names(read)
        if len(asked) == before:
            return folder, beside


def _entry(file: str, name: str, tensor: Any) -> Entry:
    if tensor.dtype not in DTYPES:
        raise InputError(f"{file}: {name} is of unknown type {tensor.dtype}")
    begin, end = tensor.data_offsets
    spec = TensorShape(dtype=DTYPES[tensor.dtype], shape=tuple(tensor.shape))
    if end - begin != spec.nbytes:
        raise InputError(f"{file} is damaged: {name} claims {end - begin} bytes")
    return Entry(file=Path(file), spec=spec, begin=begin, end=end)


def _missing_here(repo: str) -> InputError | None:
    """What is said in place of the Hub's error where the first part of an id is a folder here, so
    that a path was meant as likely."""
    folder, _, name = repo.rpartition("/")
    if not folder or not Path(folder).is_dir():
        return None
    there = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    near = difflib.get_close_matches(name, there, 3) or there[:3]
    hint = f"did you mean {', '.join(f'{folder}/{one}' for one in near)}?" if near else None
    return InputError(
        f"there is no model at {repo}: the folder {folder} is here and has no {name} in it, and "
        "the Hub gave no model of this name",
        hint=hint,
    )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as errors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: its licence has to be accepted first",
            hint=f"accept it at https://huggingface.co/{repo}, then: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repo} has no revision {revision!r}", hint="name a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _missing_here(repo) or InputError(
            f"there is no model {repo!r}, neither as a folder here nor on the Hub for this user",
            hint="check the spelling; for a private repository: hf auth login",
        ) from error
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        raise InputError(
            f"{repo} has no safetensors weights; pickled ones are never loaded",
            hint="look for a revision with safetensors, such as refs/pr/1, or convert it yourself",
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(
            f"{repo} has no config.json", hint="is it a transformers model?"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is not a Hub id: {error}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        if error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f": {error.filename}" if error.filename is not None else ""
            raise MachineError(
                f"{repo} cannot be kept in the Hub's cache: {error.strerror}{where}",
                hint="HF_HOME names another folder for it; the same command continues",
            ) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _missing_here(repo) or MachineError(
            f"the Hub did not answer for {repo}: {first}",
            hint=f"there is no folder {repo} here; for the Hub, check the network (HF_ENDPOINT "
            "names another), or HF_HUB_OFFLINE=1 takes what its cache holds",
        ) from error
    except Exception as error:
        # httpx and requests raise their own classes below the client's, by version.
        if type(error).__module__.startswith(("httpx", "requests", "httpcore", "urllib3")):
            raise _missing_here(repo) or MachineError(
                f"the Hub did not answer for {repo}: {error}",
                hint=f"there is no folder {repo} here; for the Hub, check the network",
            ) from error
        raise
