"""A row of data as a document: text, a conversation, or token ids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIR = ("prompt", "completion")
TOKENS = "input_ids"
KNOWN_FIELDS = (*CONVERSATIONS, "text", *PAIR, TOKENS)
"""What is looked for, in this order, where a recipe names no field."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of ShareGPT's `from`, as chat templates call them; others are passed on as they are."""


class DataError(ValueError):
    """Text that cannot be read or is too short, with what to do about it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Unreachable(DataError):
    """Data that the network does not give now; the same command may succeed later."""


@dataclass(slots=True)
class BadRows:
    """What becomes of a row that cannot be used: the error is raised, or counted.

    skip   count it
    count  rows skipped so far
    first  what was wrong with the first of them
    """

    skip: bool = False
    count: int = 0
    first: str = ""

    def meet(self, error: DataError) -> None:
        """Raise the error, or count the row that it names."""
        if not self.skip:
            raise DataError(
                error.message, error.hint or "mend the row, or set skip_bad_rows: true"
            ) from error
        self.first = self.first or error.message
        self.count += 1


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text, a conversation that the tokenizer's chat template is to write out, or
    tokens.

    text      the text; empty for the others
    messages  the conversation, as a list of {"role": …, "content": …}
    ids       token ids
    source    what `read_documents` was asked to read
    where     the file and row, for messages
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    ids: tuple[int, ...] = ()
    source: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of a row hold its document; with neither they are looked for by usual names.

    text_field  the one field: text, a conversation or token ids
    columns     several fields of text, joined by an empty line
    """

    text_field: str | None = None
    columns: tuple[str, ...] = field(default=())

    def among(self, names: Iterable[str], *, where: str) -> list[str]:
        """Those of `names` that are read. Raises DataError where the document is not there."""
        present = list(names)
        named = self.columns or ((self.text_field,) if self.text_field is not None else ())
        for name in named:
            if name not in present:
                raise DataError(f"{where} has no field {name!r}", _choice(present))
        chosen = list(named) or [name for name in KNOWN_FIELDS if name in present]
        if not chosen or (not named and set(chosen) < set(PAIR)):
            raise DataError(f"{where} has no field that is known to hold text", _choice(present))
        return chosen


def make_document(row: Any, fields: Fields, *, where: str, source: str) -> Document:
    """The document of one row. Raises DataError, which names the row."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is not an object with fields")
    chosen = fields.among(row, where=where)
    if fields.columns:
        texts = [_text(row[name], name, where=where) for name in chosen]
        return Document(text="\n\n".join(filter(None, texts)), source=source, where=where)
    if fields.text_field is not None:
        return _from_value(row[fields.text_field], fields.text_field, where=where, source=source)
    # An empty field gives way to the next.
    name = next((name for name in chosen if row[name] not in (None, "", [])), chosen[0])
    if name in PAIR:
        return _pair(row, where=where, source=source)
    return _from_value(row[name], name, where=where, source=source)


def _from_value(value: Any, name: str, *, where: str, source: str) -> Document:
    """What a field holds, told by its type."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value):
        if all(isinstance(item, Mapping) for item in value):
            messages = tuple(_message(item, name, where=where) for item in value)
            return Document(messages=messages, source=source, where=where)
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            if min(value) < 0:
                raise DataError(f"{where}: {name!r} holds the negative token id {min(value)}")
            return Document(ids=tuple(value), source=source, where=where)
    if isinstance(value, Sequence) and not len(value):
        value = ""
    return Document(text=_text(value, name, where=where), source=source, where=where)


def _pair(row: Mapping[str, Any], *, where: str, source: str) -> Document:
    """A prompt and its completion: texts are joined as they stand, messages are one dialogue."""
    prompt, completion = (row.get(name) for name in PAIR)
    if isinstance(prompt, str) or isinstance(completion, str):
        text = _text(prompt, PAIR[0], where=where) + _text(completion, PAIR[1], where=where)
        return Document(text=text, source=source, where=where)
    return _from_value([*(prompt or ()), *(completion or ())], "prompt", where=where, source=source)


def _message(item: Mapping[str, Any], name: str, *, where: str) -> Mapping[str, Any]:
    if "role" in item:
        role, rest = item["role"], {k: v for k, v in item.items() if v is not None}
    elif "from" in item:
        role = ROLES.get(item["from"], item["from"])
        rest = {"role": role, "content": item.get("value", item.get("content"))}
    else:
        raise DataError(f"{where}: an entry of {name!r} is not a message with a role and content")
    if not isinstance(role, str):
        raise DataError(f"{where}: the role {role!r} in {name!r} is not a name")
    return rest


def _text(value: Any, name: str, *, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: {name!r} is not UTF-8 text: {error}") from error
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(
            f"{where}: {name!r} holds no text, conversation or token ids, but a {kind}",
            "text_field names the field that does",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name!r} is not valid Unicode: {error.reason}") from error
    return value


def _choice(names: Iterable[str]) -> str:
    """A hint that lists the fields which are there."""
    return f"set text_field to one of: {', '.join(map(repr, names)) or '(it has no fields)'}"
