"""compress schema"""

import json
from pathlib import Path

import click

from compressor.cli.written import WRITTEN, put


@click.command()
@click.option("--output", "-o", type=WRITTEN, help="Write it here; printed if not given.")
def command(output: Path | None) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    \b
    compress schema > recipe.schema.json
    compress schema -o ~/.config/recipe.schema.json
    compress schema | jq '.properties | keys'
    # and at the top of a recipe:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from compressor.plan.recipe import json_schema

    put(json.dumps(json_schema(), indent=2) + "\n", output, replace=True)
