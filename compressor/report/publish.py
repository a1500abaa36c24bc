"""Makes a Hub repository hold a finished checkpoint: what its manifest names, its report and card.

What differs is sent, and one commit adds it and deletes what is stale: other weights that loaders
would take, and files of an earlier version. Nothing else in the repository is touched. Large files
are sent once, also over several tries or runs, since the Hub keeps what has arrived under its hash.
Last, what the Hub says it holds is compared with what lies here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compressor.checkpoint.lfs import is_pointer, pointer_error
from compressor.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    as_manifest,
    hash_file,
    read_manifest,
)
from compressor.checkpoint.secrets import leaks
from compressor.checkpoint.side_files import decides, leads_out
from compressor.errors import CheckError, InputError, Problems
from compressor.report.card import CARD_NAME, is_generated
from compressor.report.data import HTML_NAME, JSON_NAME, read_report
from compressor.report.hub_retry import patiently
from compressor.report.settings import Publish

BESIDE = (CARD_NAME, HTML_NAME, JSON_NAME)
"""Files outside the manifest that go up too. Nothing else in the folder does."""

STALE = re.compile(
    r"""[^/]+ (?: \.safetensors | \.gguf | \.safetensors\.index\.json | \.bin\.index\.json
        | \.h5 | \.msgpack | \.onnx | \.ot )
    | (?: pytorch_model | model | consolidated )[^/]* \.
        (?: bin | pt | pth | ckpt[^/]* | index\.json )
    | attention_policy\.json | stream_policy\.json | offsite\.json
    | params\.json | hf_quant_config\.json | quant(?:ize|ization)?_config\.json""",
    re.VERBOSE | re.IGNORECASE,
)
"""Names at the root of a repository under which loaders look for weights, or for what describes
them; a policy and an adapter's record are among it, which only this program writes."""
ADAPTER = "adapter_config.json"
"""With this file at its root, transformers takes a repository for an adapter to another model."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Listing:
    """What would go up: file name → size in bytes; and what stays."""

    folder: Path
    files: Mapping[str, int]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Changes:
    """What a push does to a repository, file by file.

    commit   the revision this holds for; None where the repository has none
    add, replace, delete  what is sent, sent in place of another content, and taken away
    same     files that are there as they lie here
    kept     files of the repository that are nobody's business; a card written by hand is one
    """

    commit: str | None
    add: tuple[str, ...]
    replace: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Files that stay and are not of this checkpoint, though loaders read them with it."""
        return tuple(name for name in self.kept if decides(name))

    @property
    def sent(self) -> tuple[str, ...]:
        """Files whose content goes up."""
        return (*self.add, *self.replace)

    def __bool__(self) -> bool:
        return bool(self.sent or self.delete)


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where it went; `commit` holds exactly these files as they lie here.

    changes  what was done to the repository; nothing where it held all that before
    """

    repo: str
    url: str
    commit: str
    files: int
    changes: Changes


def list_upload(folder: Path) -> Listing:
    """What of a checkpoint folder goes up. Raises InputError where it is not finished, where a file
    is missing or only a pointer or a link to one elsewhere, or where one holds a secret."""
    manifest = _manifest(folder)
    names = [*manifest.files, MANIFEST_NAME, *(n for n in BESIDE if (folder / n).is_file())]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing[:4])}, which its manifest names",
            hint="repeat the run that made it in a new folder",
        )
    if problems := [*_no_files(folder, names)] or [*leaks(folder, names)]:
        raise Problems(problems)
    tops = {name.partition("/")[0] for name in names}
    return Listing(
        folder=folder,
        files={name: (folder / name).stat().st_size for name in sorted(names)},
        left_out=tuple(sorted({path.name for path in folder.iterdir()} - tops)),
    )


def _no_files(folder: Path, names: Iterable[str]) -> Iterator[InputError]:
    """What lies in place of files."""
    for name in names:
        if leads_out(folder, folder / name):
            yield InputError(
                f"{name} is a link that leads out of {folder}",
                hint="put the file itself there; nothing outside the folder is uploaded",
            )
        elif is_pointer(folder / name):
            yield pointer_error(name)


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise InputError(
            f"{folder} holds no finished checkpoint: it has no {MANIFEST_NAME}",
            hint="compress run writes one; an interrupted run continues with the same command",
        )
    return manifest


def damaged(listing: Listing) -> list[str]:
    """Files whose content is not what the manifest says."""
    records = _manifest(listing.folder).files
    return [name for name, record in records.items() if hash_file(listing.folder / name) != record]


def recorded_objections(listing: Listing) -> list[str] | None:
    """Why these files should not be published, by what their own report says of them; None where
    no report speaks of them."""
    report = read_report(listing.folder)
    manifest = hash_file(listing.folder / MANIFEST_NAME).sha256
    if report is None or report.hashes.get(MANIFEST_NAME) != manifest or report.verify is None:
        return None
    found = []
    if not report.verify.get("ok"):
        found.append("it did not pass verification")
    if report.gate is not None and not report.gate.get("passed"):
        missed = [c["message"] for c in report.gate.get("checks", ()) if not c.get("passed")]
        found.append("it missed its gate: " + "; ".join(missed))
    return found


def check_token() -> str:
    """The name of the Hub user. Raises InputError where nobody is logged in."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(
            "publishing needs a Hub access token", hint="hf auth login, or set HF_TOKEN"
        )
    name: str = patiently("whoami", lambda: HfApi().whoami())["name"]
    return name


def preview(listing: Listing, to: Publish, *, replace_card: bool = False) -> Changes:
    """What a push would do, without doing it. Raises as `push` does, but at the first failure."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def look() -> Changes:
        try:
            return _compare(HfApi(), listing, to, replace_card=replace_card)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return Changes(commit=None, add=tuple(listing.files))

    return patiently(to.repo, look, tries=1)


def push(
    listing: Listing, to: Publish, *, replace_card: bool = False, progress: Progress | None = None
) -> Pushed:
    """Upload. The same call continues one that failed, and does nothing where all has arrived.

    replace_card  also where somebody wrote the repository's card by hand
    Raises InputError for a repository that may not be written, MachineError where the network or
    the Hub keep failing, CheckError where the Hub holds something else than was sent.
    """
    from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    api = HfApi()
    _make_repository(api, to)

    def compare() -> Changes:
        return _compare(api, listing, to, replace_card=replace_card)

    first = changes = patiently(to.repo, compare)

    def addition(name: str) -> CommitOperationAdd:
        return CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(listing.folder / name))

    additions = {name: addition(name) for name in changes.sent}
    for number, (name, sent) in enumerate(additions.items(), 1):
        send = partial(api.preupload_lfs_files, to.repo, [sent], revision=to.revision)
        patiently(name, send)
        if progress is not None:
            progress(name, number, len(additions))
    title = to.message or f"Upload {listing.folder.resolve().name}"

    def commit() -> None:
        # Somebody may have committed meanwhile, or the answer to this commit may have been lost.
        now = compare()
        operations: list[CommitOperation] = [additions.get(n) or addition(n) for n in now.sent]
        operations += [CommitOperationDelete(path_in_repo=name) for name in now.delete]
        if operations:
            api.create_commit(
                to.repo,
                operations,
                commit_message=title,
                revision=to.revision,
                parent_commit=now.commit,
            )

    if first:
        patiently("the commit", commit)
        changes = patiently(to.repo, compare)
    if changes:
        wrong = [*(f"{n} is not as it lies here" for n in changes.sent), *changes.delete]
        raise CheckError(
            f"{to.repo} does not hold what was sent: {'; '.join(wrong[:4])}",
            hint="do not use it; push again, or delete the repository first",
        )
    url = f"{api.endpoint}/{to.repo}"
    assert changes.commit is not None
    return Pushed(
        repo=to.repo, url=url, commit=changes.commit, files=len(listing.files), changes=first
    )


def _make_repository(api: Any, to: Publish) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def make() -> bool | None:
        try:
            return bool(api.model_info(to.repo).private)
        except RepositoryNotFoundError:
            api.create_repo(to.repo, private=to.private, exist_ok=True)
            return None

    private = patiently(to.repo, make)
    if private is False and to.private:
        raise InputError(
            f"{to.repo} exists and everyone can read it",
            hint="--public (publish.private: false) says that this is meant",
        )
    if to.revision != "main":
        patiently(to.repo, lambda: api.create_branch(to.repo, branch=to.revision, exist_ok=True))


def _compare(api: Any, listing: Listing, to: Publish, *, replace_card: bool) -> Changes:
    """What has to change for a repository to hold these files and nothing stale."""
    commit = api.model_info(to.repo, revision=to.revision).sha
    tree = api.list_repo_tree(to.repo, recursive=True, revision=commit)
    there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    if ADAPTER in there:
        raise InputError(
            f"{to.repo} holds an adapter ({ADAPTER}), which loaders would take in place of these "
            "weights",
            hint="push to another repository, or delete it there",
        )

    def content(name: str) -> bytes:
        return Path(api.hf_hub_download(to.repo, name, revision=commit)).read_bytes()

    add, replace, same = [], [], []
    for name in listing.files:
        if name not in there:
            add.append(name)
        elif _holds(there[name], listing.folder / name):
            same.append(name)
        else:
            replace.append(name)
    if CARD_NAME in replace and not replace_card and not is_generated(content(CARD_NAME)):
        replace.remove(CARD_NAME)
    others = [name for name in there if name not in listing.files]
    earlier = _earlier(content) if MANIFEST_NAME in there else {}
    delete = [
        name
        for name in others
        if STALE.fullmatch(name)
        or (name in earlier and hashlib.sha256(content(name)).hexdigest() == earlier[name].sha256)
    ]
    touched = {*add, *replace, *same, *delete}
    return Changes(
        commit=commit,
        add=tuple(add),
        replace=tuple(replace),
        delete=tuple(sorted(delete)),
        same=tuple(same),
        kept=tuple(sorted(set(there) - touched)),
    )


def _earlier(content: Callable[[str], bytes]) -> Mapping[str, FileRecord]:
    """Files of the version that the repository holds, where it is one of this program's."""
    try:
        return as_manifest(json.loads(content(MANIFEST_NAME))).files
    except (InputError, ValueError, AttributeError, RecursionError):
        return {}


def _holds(entry: Any, path: Path) -> bool:
    """Whether a file of the repository has the content of one here."""
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == hash_file(path).sha256)
    # Git's name of a file's content: SHA-1 of a header and the bytes.
    data = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
