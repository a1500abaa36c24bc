"""compress map"""

from pathlib import Path

import click

from compressor.cli.groups import Group
from compressor.cli.options import MODEL
from compressor.cli.written import WRITTEN, put


@click.group(cls=Group)
def command() -> None:
    """Maps of architectures: what a family's tensors are, and which scales fold where.

    \b
    compress map draft ./some-model -o my.yaml
    compress quantize ./some-model --scheme w4a16 --set map=my.yaml
    compress run recipe.yaml --model ./some-model --set map=my.yaml
    """


@command.command()
@click.argument("model", type=MODEL)
@click.option("--output", "-o", type=WRITTEN, help="Write the map here, where no file may be.")
def draft(model: str, output: Path | None) -> None:
    """Print a first map of MODEL, a folder whose type transformers knows and this tool does not.

    Its blocks run once on a random row: what reads one tensor shares an input, and a fold is in the
    map where the block computes the same with it. What is not certain stands at the top as a
    comment: look it through, then say model: {path: MODEL, map: my.yaml} in a recipe.

    \b
    compress map draft ./some-model > my.yaml
    compress map draft ./some-model -o my.yaml
    compress map draft ~/.cache/huggingface/some-model -o maps/some.yaml
    """
    import yaml

    from compressor.arch.load import NO_MAP
    from compressor.checkpoint.reader import open_checkpoint
    from compressor.checkpoint.source import as_source
    from compressor.foreign.calls import foreign
    from compressor.runner.draft import draft as draft_map

    checkpoint = open_checkpoint(Path(model).expanduser())
    config, headers = dict(checkpoint.config), checkpoint.shapes
    if config.pop("quantization_config", None) is not None:
        headers = as_source(checkpoint, chosen=NO_MAP).float_shapes
    with foreign("no map can be drafted: the model does not run as config.json describes it"):
        found = draft_map(config, headers)
    model_type = config.get("model_type")
    lines = [
        f"# {model_type}: a draft. docs/adding.md says what its lines mean.",
        "# Every fold was seen on a block with random weights.",
        *(f"# Unsure: {note}" for note in found.unsure),
        yaml.safe_dump(found.data, sort_keys=False, allow_unicode=True, width=100),
    ]
    put("\n".join(lines), output)
