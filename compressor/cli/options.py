"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from compressor.cli.display import Display, LogFormat
from compressor.cli.junit import Case, junit
from compressor.cli.written import WRITTEN, OnDisk
from compressor.plan.byte_sizes import parse_size

if TYPE_CHECKING:
    from compressor.plan.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def size(value: Any) -> int:
    """Bytes, as a number or such as 5GB. A usage error where there are none."""
    try:
        count = int(parse_size(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if count < 1:
        raise click.BadParameter(f"{value!r} is no size")
    return count


def device(value: str) -> str:
    """A device by name, whether it is there or not. A usage error for what is none."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise click.BadParameter(f"{value!r} is not a device; cpu, cuda or cuda:1 are")
    return value


class Model(OnDisk):
    """A folder, a GGUF file or a Hub id: a shell completes what lies on the disk."""

    name = "text"


class KnownName(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """A name, of which the shell completes those that `names` gives, asked only then."""

    def __init__(self, name: str, names: Callable[[], Iterable[str]]) -> None:
        self.name, self.names = name, names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def known_runtimes() -> Iterable[str]:
    """Runtimes, their versions and what they run on."""
    from compressor.runtimes.contract import runtime_names

    return runtime_names()


def known_formats() -> Iterable[str]:
    from compressor.formats.base import format_names

    return format_names()


def pads(value: str) -> tuple[int, int]:
    """How many of the first and of the last blocks, as 2,2. A usage error for what is none."""
    found = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4})", value)
    if found is None:
        raise click.BadParameter(f"{value!r} does not say two numbers of blocks, such as 2,2")
    return int(found[1]), int(found[2])


MODEL, PADS = Model(), pads

FOLDER = click.Path(path_type=Path)

REPLACED = ("overrides", "model", "output", "max_shard_size", "runtime")
"""Options that replace parts of a recipe."""

CASES = "compressor.cases"
"""Where a context keeps what was checked."""


@dataclass(frozen=True, slots=True)
class Told:
    """How a command says what it does and what it found."""

    log_format: LogFormat
    as_json: bool

    def display(self) -> Display:
        """Where progress is shown."""
        return Display(log_format=self.log_format)


runtime_option = click.option(
    "--for",
    "runtime",
    type=KnownName("runtime", known_runtimes),
    metavar="RUNTIME",
    help="Where it is to be loaded: vllm, sglang@0.5.23, 'vllm@0.24, tp: 2, gpu: h100'.",
)


def recipe_options(function: Command) -> Command:
    """RECIPE and what replaces parts of it, as `asked`, which reads it."""

    @wraps(function)
    def gathered(*args: Any, recipe: Path, **kwargs: Any) -> Any:
        replaced = {key: kwargs.pop(key) for key in REPLACED}

        def asked() -> Recipe:
            from compressor.plan.recipe import load_recipe

            return load_recipe(recipe, **replaced)

        return function(*args, asked=asked, **kwargs)

    found = cast(Command, gathered)
    for decorate in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Replace a key: calibration.samples=64, passes.awq.bits=3. Repeatable.",
        ),
        click.option(
            "--max-shard-size", type=size, metavar="SIZE", help="Largest output file, such as 5GB."
        ),
        runtime_option,
        click.option(
            "--output", "-o", type=MODEL, help="Folder to write, in place of the recipe's."
        ),
        click.option(
            "--model",
            "-m",
            type=MODEL,
            help="Folder, GGUF file or Hub id, in place of the recipe's.",
        ),
        click.argument("recipe", type=FOLDER),
    ):
        found = decorate(found)
    return found


def folder_argument(name: str) -> Callable[[Command], Command]:
    """A new folder to write, as the last argument or as --output."""

    def decorate(function: Command) -> Command:
        @wraps(function)
        def given(*args: Any, named: Path | None, **kwargs: Any) -> Any:
            if (kwargs[name] is None) == (named is None):
                raise click.UsageError(f"name the folder to write once: {name.upper()} or --output")
            return function(*args, **{**kwargs, name: kwargs[name] or named})

        option = click.option(
            "--output", "-o", "named", type=FOLDER, help=f"The same as {name.upper()}."
        )
        argument = click.argument(name, type=FOLDER, required=False)
        return argument(option(cast(Command, given)))

    return decorate


shard_option = click.option(
    "--max-shard-size", type=size, metavar="SIZE", default="5GB", help="Largest output file."
)


def checkpoint_options(function: Command) -> Command:
    """CHECKPOINT, its original, and the base that a delta needs."""
    for decorate in (
        click.option("--base", type=MODEL, help="Base of a delta, if it is not the recorded one."),
        click.option("--against", type=MODEL, help="The original: folder, GGUF file or Hub id."),
        click.argument("checkpoint", type=FOLDER),
    ):
        function = decorate(function)
    return function


device_option = click.option(
    "--device", type=device, metavar="TEXT", default="auto", help="cpu, cuda or cuda:1."
)


def device_options(function: Command) -> Command:
    """Where to compute, and how much memory may be taken there."""
    memory = click.option(
        "--device-memory",
        type=size,
        metavar="SIZE",
        help="Bound on device memory, such as 5GB: smaller batches, then inputs in main memory, "
        "and experts, of which some at a time are brought from there.",
    )
    return device_option(memory(function))


again_option = click.option(
    "--again",
    is_flag=True,
    help="Verify and evaluate a finished output again, though nothing has changed since.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)

log_option = click.option(
    "--log-format",
    type=click.Choice(["auto", "plain", "json"]),
    default="auto",
    help="Progress on stderr: live in a terminal, plain lines, or one JSON line per event.",
)


def junit_option(function: Command) -> Command:
    """Checks as a test report, in which a command puts its own with `add_cases`.

    A command that ends well without any has one case that says so; one inside another (run
    --dry-run is a plan) adds to the other's.
    """

    @wraps(function)
    def reported(*args: Any, junit_path: Path | None, **kwargs: Any) -> Any:
        context = click.get_current_context()
        if CASES in context.meta:
            return function(*args, **kwargs)
        name = context.command_path.partition(" ")[2]
        with junit(junit_path, name or context.command_path) as cases:
            context.meta[CASES] = cases
            return function(*args, **kwargs)

    return click.option(
        "--junit",
        "junit_path",
        type=WRITTEN,
        help="Also write what was checked as JUnit XML, for CI systems.",
    )(cast(Command, reported))


def telling_options(function: Command) -> Command:
    """Progress, a test report and machine-readable output, as `told`."""

    @wraps(function)
    def gathered(*args: Any, log_format: LogFormat, as_json: bool, **kwargs: Any) -> Any:
        return function(*args, told=Told(log_format, as_json), **kwargs)

    return log_option(junit_option(json_option(cast(Command, gathered))))


def add_cases(cases: Iterable[Case]) -> None:
    """Put what was checked into the test report of the command that runs, if it makes one."""
    kept: list[Case] = click.get_current_context().meta.setdefault(CASES, [])
    kept += cases
