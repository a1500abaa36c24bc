"""Writes the reference pages that follow from the code: docs/cli.md, recipe.md and formats.md.

python scripts/make_docs.py
"""

import inspect
import json
import types
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tables import markdown

from compressor.cli.main import cli
from compressor.methods.base import Method, get_pass, pass_names
from compressor.plan.recipe import Recipe
from compressor.runtimes.page import formats_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "<!-- Written by scripts/make_docs.py from the code; change that instead. -->"
WIDTH = 96


def pages() -> dict[str, str]:
    """File name in docs/ → its text."""
    return {"cli.md": cli_page(), "recipe.md": recipe_page(), "formats.md": formats_page()}


def cli_page() -> str:
    """Every command's help, as the command prints it."""
    parts = [
        "# The command line",
        WRITTEN,
        "Every command prints progress on stderr and its result on stdout, which is one JSON "
        "object with `--json`. Nothing asks a question.",
        *_helps(cli, "compress"),
    ]
    return "\n\n".join(parts) + "\n"


def _helps(command: click.Command, name: str) -> Iterator[str]:
    """What a command prints with --help, and those in it; each of the program has a heading."""
    context = click.Context(
        command,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
        show_default=True,
    )
    yield f"```text\n{command.get_help(context).rstrip()}\n```"
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            inner = command.get_command(context, sub)
            assert inner is not None
            yield from [f"## compress {sub}"] if command is cli else []
            yield from _helps(inner, f"{name} {sub}")


def recipe_page() -> str:
    """Every key of a recipe, and every pass with its parameters."""
    sections: list[str] = []
    seen = set()
    for path, model in _models("", Recipe):
        if model in seen:
            continue
        seen.add(model)
        sections += [f"## `{path}`", _about(model)] if path else ["## Keys"]
        sections.append(_table(model))
    passes: list[str] = []
    for name in pass_names():
        (_, kind), *inside = _models("", get_pass(name))
        passes += [f"### [{name}](methods/{name}.md)", _about(kind)]
        passes.append(_table(kind, leave_out=Method.model_fields))
        for path, model in inside:
            passes += [f"`{path}`: {_about(model)}", _table(model)]
    parts = [
        "# The recipe",
        WRITTEN,
        "A recipe is one YAML file: what to read, what to do, what to write, and when to be "
        "content. An unknown key is an error that names the nearest valid one. "
        "`--set key.path=value` replaces a key from the command line, "
        "`compress schema` prints the JSON Schema for editors, and `compress recipes` lists "
        "complete ones.",
        *sections,
        "## `passes`",
        "A list, in the order in which they run; each entry is a pass with its parameters, "
        "`- awq: {bits: 4}`. A pass either changes weights (a transform) or makes the codes (a "
        "quantizer, one for each linear). Every pass takes:",
        _table(Method),
        *passes,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _models(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those that its fields hold, with the path of each."""
    yield path, model
    for name, field in model.model_fields.items():
        for found in _inside(field.annotation):
            if name != "passes" and issubclass(found, BaseModel):
                yield from _models(f"{path}.{name}" if path else name, found)


def _inside(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _inside(argument)


def _about(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "")


def _table(model: type[BaseModel], *, leave_out: Collection[str] = ()) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = "see below"
        else:
            shown = f"`{json.dumps(default, ensure_ascii=False, default=str)}`"
        about = " ".join((field.description or "").split())
        rows.append([f"`{name}`", _type(field.annotation), _cell(shown), _cell(about)])
    return markdown(("key", "value", "default", ""), rows) if rows else ""


def _type(annotation: Any) -> str:
    """A type in words that a YAML author uses."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(a)}`" for a in arguments)
    if origin in (list, tuple, set, frozenset):
        inner = next((a for a in arguments if a is not Ellipsis), Any)
        return f"list of {_type(inner)}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    words = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys below"
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, "utf-8")
