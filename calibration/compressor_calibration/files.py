"""Rows of a local file, one at a time, so that a bad one can be named and passed over."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from compressor_calibration.documents import DataError, Fields

TEXT = (".txt", ".md")
KINDS = (*TEXT, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
ACCEPTED = f"files may be {', '.join(KINDS)}, also with {', '.join(COMPRESSED)}"
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)

BLANK = b"\xef\xbb\xbf \t\r\n"
LARGEST_JSON = 1_000_000_000
"""Bytes of a JSON file that is one value, which has to be in memory whole."""
LARGEST_CELL = 2**31 - 1
"""Characters of a CSV cell; Python's own limit is below one long document."""

Row = tuple[str, Any]
"""Where it stands, and the row; a DataError for what is no row."""


def kind_of(file: Path) -> str | None:
    """The suffix that says how a file is read, or None for other files."""
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    kind = Path(name).suffix
    packed = name != file.name.lower()
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def file_rows(file: Path, fields: Fields) -> Iterator[Row]:
    """The rows of a file; of a text file, the one that is its text. Raises DataError."""
    kind = kind_of(file)
    if kind is None:
        raise DataError(f"{file.name} is no kind of data that is known", ACCEPTED)
    if kind == ".parquet":
        yield from _parquet_rows(file, fields)
        return
    try:
        with COMPRESSED.get(file.suffix.lower(), open)(file, "rb") as stream:
            if kind in TEXT:
                yield file.name, _decode(file.name, stream.read())
            elif kind in (".csv", ".tsv"):
                yield from _csv_rows(file.name, stream, "\t" if kind == ".tsv" else ",")
            else:
                yield from _json_rows(file.name, stream, lines_only=kind != ".json")
    except DAMAGED as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _decode(where: str, raw: bytes) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}", "convert it to UTF-8") from error


def _parse(where: str, raw: bytes) -> Any:
    text = _decode(where, raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _row(where: str, raw: bytes) -> Row:
    """A row of JSON, or what is wrong with it."""
    try:
        return where, _parse(where, raw)
    except DataError as error:
        return where, error


def _json_rows(name: str, stream: BinaryIO, *, lines_only: bool) -> Iterator[Row]:
    """One row a line; or the rows of one value, which is a list or an object that holds one.

    lines_only  a value that is spread over lines begins with "["
    """
    lines = ((n, line) for n, line in enumerate(stream, 1) if line.strip(BLANK))
    first, second = next(lines, None), None
    if first is None:
        return
    whole = first[1].lstrip(BLANK).startswith(b"[")
    if not whole and not lines_only:
        second = next(lines, None)
        whole = second is None or isinstance(_row(name, first[1])[1], DataError)
    if whole:
        rest = stream.read(LARGEST_JSON)
        if stream.read(1):
            raise DataError(
                f"{name} is one JSON value of more than {LARGEST_JSON // 10**9} GB",
                "write one object on each line (.jsonl)",
            )
        raw = b"".join([first[1], second[1] if second else b"", rest])
        for number, row in enumerate(_rows_of(_parse(name, raw)), 1):
            yield f"{name} row {number}", row
        return
    for number, line in chain(filter(None, (first, second)), lines):
        yield _row(f"{name} line {number}", line)


def _rows_of(value: Any) -> list[Any]:
    """The rows of a JSON value: a list, the one list of objects in an object, or the object."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v]
        if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
            return list(lists[0])
    return [value]


def _csv_rows(name: str, stream: BinaryIO, delimiter: str) -> Iterator[Row]:
    """The rows below the header."""
    csv.field_size_limit(LARGEST_CELL)
    try:
        with io.TextIOWrapper(stream, "utf-8-sig", newline="") as lines:
            table = csv.reader(lines, delimiter=delimiter)
            header = next(table, [])
            for number, cells in enumerate(table, 1):
                where = f"{name} row {number}"
                if len(cells) == len(header):
                    yield where, dict(zip(header, cells, strict=True))
                elif cells:
                    message = f"{where} has {len(cells)} cells under {len(header)} columns"
                    yield where, DataError(message)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}", "convert it to UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{name} is not a readable table: {error}") from error


def _parquet_rows(file: Path, fields: Fields) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            chosen = fields.among(table.schema_arrow.names, where=file.name)
            for batch in table.iter_batches(batch_size=256, columns=chosen):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{file.name} row {number}"
                    try:
                        row = {name: batch[name][index].as_py() for name in chosen}
                    except ValueError as error:
                        yield where, DataError(f"{where} cannot be read: {error}")
                    else:
                        yield where, row
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not a readable parquet file: {error}") from error
