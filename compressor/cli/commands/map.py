"""compress map"""

from __future__ import annotations

import click

from compressor.cli.echo import echo


@click.group()
def command() -> None:
    """Maps of architectures: what a family's tensors are, and which scales fold where."""


@command.command()
@click.argument("model")
def draft(model: str) -> None:
    """Print a first map of MODEL, a folder whose type transformers knows and this tool does not.

    Its blocks run once on a random row: what reads one tensor shares an input, and a fold is in the
    map where the block computes the same with it. What is not certain stands at the top as a
    comment: look it through, then say model: {path: MODEL, map: my.yaml} in a recipe.

    \b
    compress map draft ./some-model > my.yaml
    """
    from pathlib import Path

    import yaml

    from compressor.checkpoint.reader import open_checkpoint
    from compressor.foreign.calls import foreign
    from compressor.runner.draft import draft as draft_map

    checkpoint = open_checkpoint(Path(model).expanduser())
    headers = {name: entry.spec.shape for name, entry in checkpoint.entries.items()}
    with foreign("no map can be drafted: the model does not run as config.json describes it"):
        found = draft_map(checkpoint.config, headers)
    model_type = checkpoint.config.get("model_type")
    echo(f"# {model_type}: a draft. docs/adding.md says what its lines mean.")
    echo("# Every fold was seen on a block with random weights.")
    for note in found.unsure:
        echo(f"# Unsure: {note}")
    echo(yaml.safe_dump(found.data, sort_keys=False, width=100).rstrip())
