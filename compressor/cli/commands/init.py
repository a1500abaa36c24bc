"""compress init"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from compressor.cli.commands.quantize import SCHEME, output_folder, quality_option, read_headers
from compressor.cli.echo import echo
from compressor.cli.importing import uncollected
from compressor.cli.options import MODEL, device_option, json_option, runtime_option
from compressor.cli.written import WRITTEN, new_file, put

if TYPE_CHECKING:
    from compressor.plan.choose import Quality


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--output",
    "-o",
    type=WRITTEN,
    help="Write the recipe here, where no file may be; printed if not given.",
)
@click.option(
    "--scheme",
    type=SCHEME,
    default="w4a16",
    help="Weights and inputs.",
)
@quality_option
@runtime_option
@device_option
@json_option
def command(
    model: str,
    output: Path | None,
    scheme: str,
    quality: str,
    runtime: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Write a recipe for a model that can be run, with every other key as a comment.

    It is what `compress quantize` chooses, to be edited: each key and each parameter of its
    passes says what it is. Reads headers only.

    \b
    compress init meta-llama/Llama-3.1-8B > llama3.yaml
    compress init ./qwen3-8b --scheme fp8 --for vllm -o qwen3-fp8.yaml
    compress init ./my-model --quality best -o my.yaml && compress plan my.yaml
    """
    new_file(output)
    with uncollected():
        from compressor.plan.choose import choose
        from compressor.plan.commented import commented

        wish, source = read_headers(
            model,
            str(output_folder(model, None, scheme)),
            scheme=scheme,
            quality=cast("Quality", quality),
            runtime=runtime,
            device=device,
        )
        choice = choose(wish, source)
    text = commented(choice.data, choice.reasons)
    if output is not None or not as_json:
        put(text, output)
    if as_json:
        about = {"file": None if output is None else str(output), "reasons": list(choice.reasons)}
        echo(json.dumps({"ok": True, **about, "recipe": choice.data}, indent=2))
    elif output is not None:
        echo(f"compress plan {output} says what it would do", err=True)
