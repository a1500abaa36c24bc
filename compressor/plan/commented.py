"""A recipe's YAML with every key that there is: those with a value, and the others as comments."""

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from compressor.methods.base import get_pass
from compressor.plan.recipe import Recipe


def commented(data: Mapping[str, Any], reasons: Iterable[str]) -> str:
    """Text that means `data`, a recipe as plain data, and says what each key is and may be."""
    lines = [f"# {reason}" for reason in reasons]
    for name, field in Recipe.model_fields.items():
        if name == "passes":
            lines += ["", f"passes:  # {field.description}", *_passes(data["passes"])]
            continue
        lines += _key(Recipe, name, data)
    return "\n".join([*lines, ""])


def _passes(steps: Iterable[Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    for step in steps:
        for name, parameters in step.items():
            kind = get_pass(name)
            # A key with comments only under it would be null, which is no parameters too.
            yield f"  - {name}:  # docs/methods/{name}.md"
            for key in kind.model_fields:
                yield from _key(kind, key, parameters, "      ")


def _key(
    model: type[BaseModel], name: str, data: Mapping[str, Any], indent: str = ""
) -> Iterator[str]:
    """The lines of one key: with its value, or as a comment with its default."""
    field = model.model_fields[name]
    says = f"  # {field.description}" if field.description else ""
    if name not in data:
        default = field.get_default(call_default_factory=True, validated_data={})
        if default is PydanticUndefined:
            default = None
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json", exclude_defaults=True)
        yield f"{indent}# {name}: {_flow(default)}{says}"
        return
    kinds = (field.annotation, *typing.get_args(field.annotation))  # of Evaluation | None, say
    models = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    inner = next(models, None)
    if inner is None or not isinstance(data[name], dict):
        yield f"{indent}{name}: {_flow(data[name])}{says}"
        return
    yield f"{indent}{name}:{says}"
    for key in inner.model_fields:
        yield from _key(inner, key, data[name], f"{indent}  ")


def _flow(value: Any) -> str:
    """A value's YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()
