"""compress completion"""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from compressor.cli.written import WRITTEN, put

VARIABLE = "_COMPRESS_COMPLETE"
"""By which a shell asks for completions."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--output", "-o", type=WRITTEN, help="Write it here; printed if not given.")
def command(shell: str, output: Path | None) -> None:
    """Print what lets a shell complete commands, options, schemes, runtimes and files.

    \b
    compress completion bash >> ~/.bashrc
    compress completion zsh >> ~/.zshrc
    compress completion fish -o ~/.config/fish/completions/compress.fish
    """
    from compressor.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    put(kind(cli, {}, "compress", VARIABLE).source(), output, replace=True)
