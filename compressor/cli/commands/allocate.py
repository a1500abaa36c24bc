"""compress allocate"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from compressor.cli.echo import echo
from compressor.cli.options import TEXT_FILE, json_option


@click.command()
@click.argument("file", type=TEXT_FILE)
@click.option(
    "--bits-per-weight",
    required=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Mean over all measured weights, scales and zero points included.",
)
@click.option("--output", "-o", type=TEXT_FILE, help="Write the recipe here; printed if not given.")
@json_option
def command(file: Path, bits_per_weight: float, output: Path | None, as_json: bool) -> None:
    """Make a mixed-precision recipe from what `compress measure` wrote.

    Reads no model. Bits go where they lower the summed error most.

    \b
    compress allocate sensitivity.json --bits-per-weight 4.5
    compress allocate sensitivity.json --bits-per-weight 4.5 -o mixed.yaml
    compress allocate sensitivity.json --bits-per-weight 3.5 --json
    """
    import yaml

    from compressor.checkpoint.durable import write_atomically
    from compressor.foreign.calls import foreign
    from compressor.foreign.untrusted import read_file
    from compressor.plan.recipe import make_recipe
    from compressor.run.allocate import allocate, mixed_recipe, parse_sensitivity

    found = parse_sensitivity(read_file(file, what="sensitivities"), where=str(file))
    choice = allocate(found, bits_per_weight)
    with foreign(f"{file} is not what compress measure writes"):
        recipe = mixed_recipe(found, choice)
    make_recipe(recipe)
    text = yaml.safe_dump(recipe, sort_keys=False, width=100)
    spent = found.bits_per_weight(choice)
    chosen = [group.options[i] for group, i in zip(found.groups, choice, strict=True)]
    counts = Counter("as it is" if o.bits is None else f"{o.bits} bits" for o in chosen)
    if output is not None:
        write_atomically(output, text.encode())
    if as_json:
        about = {"bits_per_weight": spent, "groups": dict(counts), "recipe": recipe}
        echo(json.dumps({"ok": True, **about}, indent=2))
        return
    if output is None:
        echo(text, nl=False)
    shares = ", ".join(f"{count} groups {what}" for what, count in sorted(counts.items()))
    echo(f"{spent:.3f} bits per weight: {shares}", err=True)
