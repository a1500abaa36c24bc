"""Writes the reference pages that follow from the code: docs/cli.md, recipe.md and formats.md.

python scripts/make_docs.py            write them
python scripts/make_docs.py --check    exit code 1 if one of them is out of date
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

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
        _help(cli, "compress"),
    ]
    context = click.Context(cli, info_name="compress")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts += [f"## compress {name}", _help(command, f"compress {name}")]
        if isinstance(command, click.Group):
            parts += [
                _help(inner, f"compress {name} {sub}") for sub, inner in command.commands.items()
            ]
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command, name: str) -> str:
    context = click.Context(
        command,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
        show_default=True,
    )
    return f"```text\n{command.get_help(context).rstrip()}\n```"


def recipe_page() -> str:
    """Every key of a recipe, and every pass with its parameters."""
    sections, seen = [], set()
    for path, model in _models("", Recipe):
        if model in seen:
            continue
        seen.add(model)
        title = f"## `{path}`" if path else "## Keys"
        about = "" if model is Recipe else _about(model)
        sections.append("\n\n".join(filter(None, [title, about, _table(model)])))
    own = set(Method.model_fields)
    passes = []
    for name in pass_names():
        kind = get_pass(name)
        link = f"[{name}](methods/{name}.md)"
        fields = _table(kind, leave_out=own)
        inner = [
            f"`{path}`: {_about(model)}\n\n{_table(model)}"
            for path, model in _models("", kind)
            if path
        ]
        passes.append("\n\n".join(filter(None, [f"### {link}", _about(kind), fields, *inner])))
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
    return "\n\n".join(parts) + "\n"


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


def _table(model: type[BaseModel], *, leave_out: set[str] | None = None) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if name in (leave_out or set()):
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = "see below"
        else:
            value = list(default) if isinstance(default, tuple) else default
            shown = f"`{json.dumps(value, ensure_ascii=False, default=str)}`"
        about = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_cell(shown)} | {_cell(about)} |")
    if not rows:
        return ""
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, "utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
