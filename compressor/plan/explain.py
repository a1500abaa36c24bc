"""What pydantic found wrong with keys that a user wrote, in a user's words."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from compressor.errors import InputError, nearest

SHOWN = 60
"""Characters of a wrong value."""

WORDS = {
    "int_parsing": "not a whole number",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "bool_parsing": "neither true nor false",
    "bool_type": "neither true nor false",
    "string_type": "not a text",
    "tuple_type": "not a list",
    "list_type": "not a list",
    "dict_type": "not a group of keys",
    "model_type": "not a group of keys",
    "model_attributes_type": "not a group of keys",
    "greater_than": "not above {gt}",
    "greater_than_equal": "below {ge}, the least",
    "less_than": "not below {lt}",
    "less_than_equal": "above {le}, the most",
}
"""By pydantic's types of errors, after "is"."""


class WrongKey(InputError):
    """A key or its value is wrong; `place` is its path, with dots and numbers of list entries."""

    def __init__(self, message: str, *, place: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.place = place


def explain(error: ValidationError, model: type[BaseModel], prefix: str) -> list[WrongKey]:
    """One error for each thing pydantic found wrong in the keys of `model`, which stand under
    `prefix`."""
    return [_explained(item, model, prefix) for item in error.errors()]


def _explained(item: ErrorDetails, model: type[BaseModel], prefix: str) -> WrongKey:
    path = [str(part) for part in item["loc"]]
    where = (prefix + ".".join(path)).rstrip(".")
    kind, value = item["type"], item.get("input")
    field = _group_at(model, path[:-1]).get(path[-1]) if path else None
    meaning = f"{path[-1]}: {field.description}" if field and field.description else None
    if kind == "extra_forbidden":
        keys = list(_group_at(model, path[:-1]))
        hint = nearest(path[-1], keys) if keys else None
        return WrongKey(f"unknown key {where!r}", place=where, hint=hint)
    if kind == "missing":
        return WrongKey(f"key {where!r} is missing", place=where, hint=meaning)
    got = repr(value)
    shown = got if len(got) < SHOWN else got[: SHOWN - 3] + "..."
    if kind in WORDS:
        wrong = WORDS[kind].format_map(item.get("ctx", {}))
        hint = _form(kind, value, model, path) or meaning
        return WrongKey(f"{where} is {shown}, {wrong}", place=where, hint=hint)
    said = item["msg"].removeprefix("Value error, ")
    if not where:
        return WrongKey(said, place=where)
    if isinstance(value, dict):
        # Of keys that do not go together: the reason names them, in a rule's own words too.
        return WrongKey(f"{where}: {said}", place=where)
    return WrongKey(f"{where}: {said} (got {shown})", place=where, hint=meaning)


def _form(kind: str, value: Any, model: type[BaseModel], path: Sequence[str]) -> str | None:
    """How a list or a group of keys looks."""
    key = next((part for part in reversed(path) if not part.isdigit()), "")
    if WORDS[kind] == "not a list" and isinstance(value, str | int | float):
        return f"{key}: [{value}]"
    if WORDS[kind] == "not a group of keys" and (keys := list(_group_at(model, path))):
        return f"{key}: {{{keys[0]}: …}}; its keys are {', '.join(sorted(keys))}"
    return None


def _group_at(model: type[BaseModel], path: Sequence[str]) -> dict[str, FieldInfo]:
    """The keys that the group at a path takes; none where it is no group."""
    fields = model.model_fields
    for key in path:
        field = fields.get(key)
        group = next(_groups(field.annotation), None) if field else None
        fields = group.model_fields if group else {}
    return fields


def _groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type: of an optional one, a list, or a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _groups(inner)
