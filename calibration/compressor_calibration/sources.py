"""Where text comes from: the bundled works, files, folders and Hub data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor_calibration.bundled import Part, bundled_text

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


class DataError(ValueError):
    """Text that cannot be read or is too short, with what to do about it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text, or a conversation that the tokenizer's chat template is to write out.

    text      the text; empty for a conversation
    messages  the conversation, as a list of {"role": …, "content": …}; empty for a text
    source    what `read_documents` was asked to read
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    source: str = ""


def read_documents(
    data: str, *, part: Part, split: str = "train", text_field: str = "text"
) -> Iterator[Document]:
    """The documents of `data`, read as they are asked for.

    data        "bundled"; a .txt, .md, .jsonl or .parquet file; a folder, whose files of those
                kinds are read in order of name; else the id of a Hub data set
    part        which of the bundled texts "bundled" stands for
    split       split of a Hub data set
    text_field  field or column that holds the text; a row with `messages` is a conversation

    Raises DataError, also while it is being iterated.
    """
    if data == "bundled":
        yield Document(text=bundled_text(part), source=f"bundled {part} text")
        return
    path = Path(data)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise DataError(f"no text in the folder {data}", f"files may be {', '.join(SUFFIXES)}")
    elif path.is_file():
        files = [path]
    elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
        raise DataError(
            f"there is no file {data}",
            "calibration text is `bundled`, a file, a folder or the id of a Hub data set",
        )
    else:
        for row in _hub_rows(data, split):
            yield _document(row, text_field, where=f"data set {data}", source=data)
        return
    for file in files:
        yield from _read_file(file, text_field, source=data)


def _read_file(file: Path, text_field: str, *, source: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        for number, row in _json_lines(file):
            yield _document(row, text_field, where=f"{file.name} line {number}", source=source)
    elif file.suffix == ".parquet":
        for row in _parquet_rows(file, text_field):
            yield _document(row, text_field, where=file.name, source=source)
    elif file.suffix in SUFFIXES:
        yield Document(text=_decode(file, file.read_bytes()), source=source)
    else:
        raise DataError(f"{file.name} is no kind of text", f"files may be {', '.join(SUFFIXES)}")


def _decode(file: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 text: {error}", "convert it to UTF-8") from error


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(_decode(file, line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{file.name} line {number} is not JSON: {error}") from error


def _parquet_rows(file: Path, text_field: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(file) as table:
            known = [c for c in ("messages", text_field) if c in table.schema_arrow.names]
            if not known:
                raise _no_text(text_field, table.schema_arrow.names, where=file.name)
            for batch in table.iter_batches(batch_size=256, columns=known):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{file.name} is not a readable parquet file: {error}") from error


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    # What fails here is the network, the Hub, a decoder or the data set's own files, each with an
    # exception type of its own.
    except Exception as error:
        raise DataError(
            f"cannot read split {split!r} of the data set {name!r}: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}",
            "without a network, give a local file or folder, or use `data: bundled`",
        ) from error


def _document(row: Any, text_field: str, *, where: str, source: str) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is not an object with fields")
    messages = row.get("messages")
    if messages:
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise DataError(f"{where}: `messages` is not a list of role and content")
        return Document(messages=tuple(messages), source=source)
    text = row.get(text_field)
    if text is None and text_field in row:
        text = ""
    if not isinstance(text, str):
        raise _no_text(text_field, row, where=where)
    return Document(text=text, source=source)


def _no_text(text_field: str, fields: Iterable[str], *, where: str) -> DataError:
    return DataError(
        f"{where} has no text in field {text_field!r}",
        f"set text_field to one of: {', '.join(sorted(fields)) or '(it has no fields)'}",
    )
