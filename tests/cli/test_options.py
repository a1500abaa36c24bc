"""What is the same in every command: names of options, examples that can be typed, completion."""

import os
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from compressor.cli.commands.completion import VARIABLE
from compressor.cli.main import cli
from tests.support.commands import leaves

COMMANDS = dict(leaves(cli))


def test_an_option_has_the_same_names_everywhere() -> None:
    spelled: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for words, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option):
                names = tuple(sorted(option.opts))
                for name in names:
                    spelled[name][names].append(" ".join(words))
    assert [dict(ways) for ways in spelled.values() if len(ways) > 1] == []
    assert {name for name in spelled if not name.startswith("--")} == {"-o", "-m"}


def test_what_can_be_written_can_be_named_by_output() -> None:
    named = {
        words
        for words, command in COMMANDS.items()
        if any("-o" in option.opts for option in command.params)
    }
    assert set(COMMANDS) - named == {
        ("audit",),
        ("compare",),
        ("delta", "diff"),
        ("eval",),
        ("inspect",),
        ("policy", "show"),
        ("push",),
        ("verify",),
    }, "which write nothing that has one place"


def examples(command: click.Command) -> list[str]:
    """Lines of a command's help that begin with `compress`, with those that they go on in."""
    text = (command.help or "").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line.startswith("compress ")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_three_examples_that_parse(words: tuple[str, ...]) -> None:
    shown = examples(COMMANDS[words])
    calling = f"compress {' '.join(words)}"
    assert len([line for line in shown if line.startswith(calling)]) >= 3
    for line in shown:
        for part in line.split("&&"):
            arguments = shlex.split(part, comments=True)
            ends = [i for i, word in enumerate(arguments) if word in (">", ">>", "|")]
            called, command = arguments[1 : ends[0] if ends else None], cli
            context = click.Context(cli, **cli.context_settings)
            while isinstance(command, click.Group):
                name, *called = called
                found = command.get_command(context, name)
                assert found is not None, f"{line}: there is no {name}"
                command = found
            command.make_context(words[-1], called, parent=context)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, ["completion", shell])
    assert printed.exit_code == 0 and f"{VARIABLE}={shell}_complete" in printed.stdout
    file = tmp_path / "completions" / "compress"
    assert CliRunner().invoke(cli, ["completion", shell, "-o", str(file)]).exit_code == 0
    assert file.read_text() == printed.stdout


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("compress quan", ["plain,quantize"]),
        ("compress quantize m --scheme mx", ["plain,mxfp4", "plain,mxfp8"]),
        ("compress plan r.yaml --for vl", ["plain,vllm"]),
        ("compress inspect out/", ["file,out/"]),
        ("compress delta ap", ["plain,apply"]),
        ("compress mistyped al", ["plain,allocate"]),
    ],
)
def test_what_is_completed(typed: str, offered: list[str]) -> None:
    environment = {
        **os.environ,
        VARIABLE: "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    program = [sys.executable, "-m", "compressor"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == offered


def test_a_folder_to_write_is_named_once(tmp_path: Path) -> None:
    for names in ([], ["one", "-o", "two"]):
        found = CliRunner().invoke(cli, ["convert", str(tmp_path), *names])
        assert found.exit_code == 2 and "OUTPUT or --output" in found.output
