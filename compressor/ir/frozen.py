"""The base of all values that come from a recipe or a file."""

from types import ModuleType
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def class_of(module: ModuleType, kind: type[T]) -> type[T]:
    """The one class of this kind that a module defines. What its generic base is with arguments,
    which pydantic puts beside it, is called `Base[…]` and does not count."""
    own = (x for x in vars(module).values() if isinstance(x, type) and issubclass(x, kind))
    (found,) = {x for x in own if x.__module__ == module.__name__ and x.__name__[-1] != "]"}
    return found


def messages(error: ValidationError) -> list[str]:
    """What is wrong, each with its path."""
    found = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        found.append(f"{path}: {message}" if path else message)
    return found
