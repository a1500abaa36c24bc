"""compress schema"""

from __future__ import annotations

import json

import click

from compressor.cli.echo import echo


@click.command()
def command() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    \b
    compress schema > recipe.schema.json
    # and at the top of a recipe:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from compressor.plan.recipe import json_schema

    echo(json.dumps(json_schema(), indent=2))
