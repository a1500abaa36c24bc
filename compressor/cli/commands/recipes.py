"""compress recipes"""

import json
from pathlib import Path

import click

from compressor.cli.echo import echo, say
from compressor.cli.options import json_option
from compressor.cli.written import WRITTEN, put
from compressor.errors import InputError, nearest


@click.command()
@click.argument("name", required=False)
@click.option("--output", "-o", type=WRITTEN, help="Write the recipe here, where no file may be.")
@json_option
def command(name: str | None, output: Path | None, as_json: bool) -> None:
    """List the recipes that come with the program, or print one.

    \b
    compress recipes                       # names, and what each does
    compress recipes llama2-awq > my.yaml  # a start for your own
    compress recipes smollm2-awq -o my.yaml && compress plan my.yaml
    """
    from compressor.plan.recipe_file import shipped

    found = {key: file.read_text("utf-8") for key, file in shipped().items()}
    if name is not None:
        wanted = name.removesuffix(".yaml")
        if wanted not in found:
            raise InputError(f"there is no recipe {name!r}", hint=nearest(wanted, list(found)))
        if as_json:
            import yaml

            echo(json.dumps(yaml.safe_load(found[wanted]), indent=2))
        else:
            put(found[wanted], output)
        return
    if output is not None:
        raise click.UsageError("--output needs the NAME of a recipe")
    titles = {key: text.split("\n", 1)[0].lstrip("# ") for key, text in found.items()}
    width = max(map(len, titles), default=0)
    say(titles, (f"{key:{width}}  {title}" for key, title in titles.items()), as_json=as_json)
