"""Uploads a finished checkpoint to the Hub: what its manifest names, its report and its card.

A file is sent and then the commit; the large ones are sent once, also over several tries or runs,
since the Hub keeps what has arrived under its hash. Last, what the Hub says it holds is compared
with what lies here.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from compressor.card import CARD_NAME
from compressor.errors import CheckError, CompressError, InputError, MachineError
from compressor.manifest import MANIFEST_NAME, Manifest, hash_file, read_manifest
from compressor.report import HTML_NAME, JSON_NAME, read_report
from compressor.report_settings import Publish

BESIDE = (CARD_NAME, HTML_NAME, JSON_NAME)
"""Files outside the manifest that go up too. Nothing else in the folder does."""

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
SCANNED = (".json", ".md", ".yaml", ".html", ".txt", ".jinja")
TRIES = 5
PASSING = (408, 409, 422, 425, 429)
"""Answers that another try may turn into a good one, beside those of a failing server; 422 is what
a store says to bytes that arrived with another hash."""

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


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
class Pushed:
    """Where it went; `commit` holds exactly these files as they lie here."""

    repo: str
    url: str
    commit: str
    files: int


def list_upload(folder: Path) -> Listing:
    """What of a checkpoint folder goes up. Raises InputError where it is not finished, where a file
    is missing, or where one holds an access token."""
    manifest = _manifest(folder)
    names = [*manifest.files, MANIFEST_NAME, *(n for n in BESIDE if (folder / n).is_file())]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing[:4])}, which its manifest names",
            hint="repeat the run that made it in a new folder",
        )
    for name in names:
        if name.endswith(SCANNED) and TOKEN.search((folder / name).read_bytes()):
            raise InputError(
                f"{name} holds what looks like a Hub access token",
                hint="take it out, and revoke it if it was ever shared; nothing was uploaded",
            )
    return Listing(
        folder=folder,
        files={name: (folder / name).stat().st_size for name in sorted(names)},
        left_out=tuple(sorted({path.name for path in folder.iterdir()} - set(names))),
    )


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
    name: str = _patiently("whoami", lambda: HfApi().whoami())["name"]
    return name


def push(listing: Listing, to: Publish, *, progress: Progress | None = None) -> Pushed:
    """Upload. The same call continues one that failed, and does nothing where all has arrived.

    Raises InputError for a repository that may not be written, MachineError where the network or
    the Hub keep failing, CheckError where the Hub holds something else than was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    api = HfApi()
    _make_repository(api, to)
    found = _differing(api, listing, to.repo, to.revision)
    if not found:
        return _pushed(api, listing, to)
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(listing.folder / name))
        for name in listing.files
    ]
    for number, addition in enumerate(additions, 1):
        name = addition.path_in_repo
        send = partial(api.preupload_lfs_files, to.repo, [addition], revision=to.revision)
        _patiently(name, send)
        if progress is not None:
            progress(name, number, len(additions))
    title = to.message or f"Upload {listing.folder.resolve().name}"

    def commit() -> None:
        # The answer to a commit may be lost although it was made.
        if _differing(api, listing, to.repo, to.revision):
            api.create_commit(to.repo, additions, commit_message=title, revision=to.revision)

    _patiently("the commit", commit)
    wrong = _differing(api, listing, to.repo, to.revision)
    if wrong:
        raise CheckError(
            f"{to.repo} does not hold what was sent: {'; '.join(wrong[:4])}",
            hint="do not use it; push again, or delete the repository first",
        )
    return _pushed(api, listing, to)


def _make_repository(api: Any, to: Publish) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def make() -> bool | None:
        try:
            return bool(api.model_info(to.repo).private)
        except RepositoryNotFoundError:
            api.create_repo(to.repo, private=to.private, exist_ok=True)
            return None

    private = _patiently(to.repo, make)
    if private is False and to.private:
        raise InputError(
            f"{to.repo} exists and everyone can read it",
            hint="--public (publish.private: false) says that this is meant",
        )
    if to.revision != "main":
        _patiently(to.repo, lambda: api.create_branch(to.repo, branch=to.revision, exist_ok=True))


def _pushed(api: Any, listing: Listing, to: Publish) -> Pushed:
    info = _patiently(to.repo, lambda: api.model_info(to.repo, revision=to.revision))
    url = f"{api.endpoint}/{to.repo}"
    return Pushed(repo=to.repo, url=url, commit=info.sha, files=len(listing.files))


def _differing(api: Any, listing: Listing, repo: str, revision: str) -> list[str]:
    """Files that the Hub does not hold as they lie here, and how they differ."""
    names = list(listing.files)
    found = _patiently(
        repo, lambda: api.get_paths_info(repo, names, revision=revision, expand=False)
    )
    there = {entry.path: entry for entry in found}
    wrong = []
    for name, size in listing.files.items():
        entry = there.get(name)
        if entry is None:
            wrong.append(f"{name} is not there")
        elif entry.size != size:
            wrong.append(f"{name} has {entry.size} bytes, not {size}")
        elif entry.lfs is not None:
            if entry.lfs.sha256 != hash_file(listing.folder / name).sha256:
                wrong.append(f"{name} has another content")
        elif entry.blob_id != _git_hash(listing.folder / name):
            wrong.append(f"{name} has another content")
    return wrong


def _git_hash(path: Path) -> str:
    """What git calls a file's content: SHA-1 of a header and the bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _patiently(what: str, attempt: Callable[[], Result]) -> Result:
    """The result of an attempt that is repeated while the network or the Hub fail."""
    for number in range(TRIES):
        try:
            return attempt()
        except CompressError:
            raise
        except Exception as error:
            final = _verdict(what, error)
            if final is not None:
                raise final from error
            if number == TRIES - 1:
                raise MachineError(
                    f"the Hub kept failing at {what}: {_first_line(error)}",
                    hint="the same command continues; what has arrived is not sent again",
                ) from error
            time.sleep(2**number)
    raise AssertionError("unreachable")


def _verdict(what: str, error: Exception) -> CompressError | None:
    """The error that ends an upload, or None where another try may do."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # The client says which file it was about, and keeps what happened behind that.
        return _verdict(what, error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set", hint="unset it to upload")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(
            f"the Hub does not let this user write {what}: {_first_line(error)}",
            hint="hf auth login with a token that may write",
        )
    if status is not None:
        if status >= 500 or status in PASSING:
            return None
        return MachineError(f"the Hub refused {what}: {_first_line(error)}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{what}: {_first_line(error)}", hint="a repository is user/name")
    if isinstance(error, (OSError, ValueError, RuntimeError)):
        # Xet's client, which is not Python, has no errors of its own but for these.
        return None
    if type(error).__module__.partition(".")[0] in NETWORK_PACKAGES:
        return None
    raise error


NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Whose errors the Hub's client lets through, by version."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
