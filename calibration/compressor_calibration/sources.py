"""Where text comes from: the bundled works, files, folders and Hub data sets."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from compressor_calibration.bundled import BUNDLED, BUNDLED_NAMES, KINDS, Part, bundled_text
from compressor_calibration.documents import (
    BadRows,
    DataError,
    Document,
    Fields,
    Unreachable,
    make_document,
)
from compressor_calibration.files import ACCEPTED, Row, file_rows, kind_of

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CARD = re.compile(
    r"(readme|licen[sc]e|copying|notice|changelog|contributing|citation|code_of_conduct)([._-].*)?",
    re.IGNORECASE,
)
SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` of `datasets` leaves in a folder."""
USUAL_SPLIT: Mapping[Part, str] = {"calibration": "train", "held_out": "test"}
LARGEST_CARD = 1_000_000
CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
"""Packages below the Hub's client, by version, whose errors are the network's."""


def read_documents(
    data: str,
    *,
    part: Part,
    config: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    columns: tuple[str, ...] = (),
    revision: str | None = None,
    streaming: bool = True,
    bad_rows: BadRows | None = None,
) -> Iterator[Document]:
    """The documents of `data`, read as they are asked for.

    data        "bundled", all kinds one after the other, or one, such as "bundled/code"; a file
                (its kinds: `files.KINDS`); a folder, whose files of those kinds are read in order
                of name; else the id of a Hub data set
    part        which of the two bundled texts of a kind is meant, and which split is meant where
                none is named: train, or test for text that is held out
    config      configuration of a Hub data set, or of a folder whose README.md names some
    split       of a Hub data set or a folder, told by the names of its files and folders as
                `datasets` does; a folder whose names tell none is read whole where none is asked
                for. A file is one
    text_field  field that holds text, a conversation or token ids. Without it, and without
                `columns`, these are looked for: messages or conversations, text, prompt and
                completion, input_ids
    columns     fields of text that are joined by an empty line
    revision    of a Hub data set
    streaming   read a Hub data set as it is asked for, rather than download it first
    bad_rows    what becomes of rows that cannot be used; by default the first is an error

    Raises DataError, also while it is being iterated.
    """
    if data == BUNDLED or data in BUNDLED_NAMES:
        for kind in KINDS if data == BUNDLED else (BUNDLED_NAMES[data],):
            yield Document(text=bundled_text(part, kind), source=f"{BUNDLED}/{kind}, {part}")
        return
    if data.startswith(f"{BUNDLED}/"):
        raise DataError(f"there is no text {data}", f"one of: {', '.join(BUNDLED_NAMES)}")
    fields = Fields(text_field=text_field, columns=columns)
    met = bad_rows or BadRows()
    path = _local(data)
    if path is None:
        rows = _library_rows(
            data,
            config=config,
            split=split or USUAL_SPLIT[part],
            revision=revision,
            streaming=streaming,
        )
    elif revision is not None:
        raise DataError(f"{data} is on this machine and has no revisions", "drop revision")
    elif path.is_dir():
        rows = _folder_rows(path, fields, config=config, split=split, usual=USUAL_SPLIT[part])
    elif config is not None:
        raise DataError(f"{data} is a file and has no configurations", "drop config")
    else:
        rows = file_rows(path, fields)
    for where, row in rows:
        if isinstance(row, str):
            yield Document(text=row, source=data, where=where)
            continue
        try:
            if isinstance(row, DataError):
                raise row
            document = make_document(row, fields, where=where, source=data)
        except DataError as error:
            met.meet(error)
        else:
            yield document


def _local(data: str) -> Path | None:
    """The file or folder, or None for what can only be a Hub id."""
    try:
        path = Path(data).expanduser()
        if path.is_dir() or path.is_file():
            return path
        irregular = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{data!r} cannot be opened: {error}") from error
    if irregular:
        raise DataError(f"{data} is neither a file nor a folder")
    if kind_of(path) is not None or not HUB_ID.fullmatch(data):
        raise DataError(
            f"there is no file {data}",
            "text comes from `bundled`, a file, a folder or the id of a Hub data set",
        )
    return None


def _folder_rows(
    folder: Path, fields: Fields, *, config: str | None, split: str | None, usual: str
) -> Iterator[Row]:
    """Rows of a folder: of its files one after the other, or through `datasets` where it was
    written by it, describes configurations, or a part of a split is asked for."""
    if any((folder / name).is_file() for name in SAVED):
        yield from _saved_rows(folder, split=split, usual=usual)
    elif config is not None or (split is not None and "[" in split) or _describes_configs(folder):
        yield from _library_rows(
            str(folder), config=config, split=split or usual, revision=None, streaming=True
        )
    else:
        for file in _files_of(folder, split=split, usual=usual):
            for where, row in file_rows(folder / file, fields):
                # Files of several folders often have the same name.
                yield where.replace(Path(file).name, file, 1), row


def _describes_configs(folder: Path) -> bool:
    """Whether the head of README.md says which files are which configuration."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > LARGEST_CARD:
        return False
    try:
        return bool((metadata_load(card) or {}).get("configs"))
    except (ValueError, OSError, yaml.YAMLError, RecursionError):
        return False


def _files_of(folder: Path, *, split: str | None, usual: str) -> list[str]:
    """Names in the folder of the files of a split, in order."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if kind_of(path) is not None and not CARD.fullmatch(path.name) and path.is_file()
    )
    names = [n for n in names if not any(part.startswith((".", "__")) for part in n.split("/"))]
    if not names:
        raise DataError(
            f"no data in the folder {folder}", f"{ACCEPTED}; cards and licences are not read"
        )
    splits = _splits(names)
    if not splits and split in (None, "train"):
        return names
    chosen = (split or usual).split("+")
    missing = [name for name in chosen if name not in splits]
    if missing:
        raise DataError(
            f"the folder {folder} has no split {missing[0]!r}",
            f"its files tell of: {', '.join(splits)}"
            if splits
            else "a folder whose file names tell no splits is all `train`",
        )
    return [name for wanted in chosen for name in splits[wanted]]


def _splits(names: list[str]) -> dict[str, list[str]]:
    """Files by the split that their names, or those of their folders, tell of; the rules are
    those of `datasets`. Empty where they tell none."""
    from datasets.data_files import (
        DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    )
    from fsspec.utils import glob_translate

    sharded: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"data/([\w.]+)-\d{5}-of-\d{5}[^/]*\.[^/]*", name):
            sharded.setdefault(found[1], []).append(name)
    if sharded:
        return sharded
    for patterns in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        found_splits = {}
        for split, globs in patterns.items():
            rules = [re.compile(glob_translate(glob)) for glob in globs]
            of_split = [name for name in names if any(rule.match(name) for rule in rules)]
            if of_split:
                found_splits[str(split)] = of_split
        if found_splits:
            return found_splits
    return {}


def _saved_rows(folder: Path, *, split: str | None, usual: str) -> Iterator[Row]:
    """Rows of what `save_to_disk` wrote: one split, or several by name."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} is not a readable data set: {_first_words(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if (split or usual) not in saved:
            raise DataError(
                f"the folder {folder} has no split {split or usual!r}",
                f"it has: {', '.join(saved)}",
            )
        saved = saved[split or usual]
    for number, row in enumerate(saved, 1):
        yield f"{folder.name} row {number}", row


def _library_rows(
    name: str, *, config: str | None, split: str, revision: str | None, streaming: bool
) -> Iterator[Row]:
    """Rows of a Hub data set or a local folder, by the `datasets` library."""
    import datasets
    from huggingface_hub import HfApi

    which = f"data set {name}" + (f", {config}" if config else "") + f", split {split}"
    # A part of a split, and what is cached of an earlier download, are not to be had in a stream.
    streaming = streaming and "[" not in split and not datasets.config.HF_HUB_OFFLINE
    try:
        if streaming and not Path(name).is_dir():
            # Answers at once where there is no network; the library tries again for half a minute.
            HfApi().dataset_info(name, revision=revision, timeout=10)
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if builder.name == "text":
            # By default each line is a row, without its end.
            builder = datasets.load_dataset_builder(
                name, config, revision=revision, sample_by="document"
            )
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        for number, row in enumerate(rows, 1):
            yield f"{which}, row {number}", row
    # What fails here is the network, the Hub, a decoder or the data set's own files, each with an
    # exception type of its own.
    except Exception as error:
        refusal = DataError(
            f"cannot read the {which}: {_first_words(error)}",
            "config, split and revision name a part of a data set; without a network, give a local "
            "file or folder, or use `data: bundled`",
        )
        if _network(error):
            refusal = Unreachable(refusal.message, refusal.hint)
        raise refusal from error


def _network(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the network's and not the data's."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return bool(status == 429 or status >= 500)
        if isinstance(error, (ConnectionError, TimeoutError)):
            return True
        if type(error).__module__.startswith(CLIENTS):
            return True
        error = error.__cause__
    return False


def _first_words(error: Exception) -> str:
    """What a library said, in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:400]
