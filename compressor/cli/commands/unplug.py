"""compress unplug"""

from pathlib import Path

import click

from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.options import FOLDER, MODEL, PADS, Told, folder_argument, telling_options


@click.command()
@click.argument("model", type=MODEL)
@folder_argument("output")
@click.option("--pads", type=PADS, help="First and last blocks of a full model, such as 2,2.")
@click.option(
    "--emulator",
    type=FOLDER,
    help="The emulator that was tuned, where MODEL is what a trainer saved without offsite.json.",
)
@telling_options
def command(
    model: str,
    output: Path,
    pads: tuple[int, int] | None,
    emulator: Path | None,
    told: Told,
) -> None:
    """Take the adapter, its first and last blocks, out of a model.

    MODEL is a full model, of which --pads says how many, or a tuned emulator. OUTPUT gets
    adapter.safetensors under the full model's names, and offsite.json, which says whose it is:
    `compress plug` puts it back. Plugged into the model that it came out of, it gives the same
    files.

    \b
    compress unplug ./tuned ./adapter --emulator out/emulator
    compress unplug ./llama2-7b-mine ./adapter --pads 2,2
    compress unplug ./llama2-7b-mine -o ./adapter --pads 2,2 --json
    """
    from compressor.checkpoint.find import locate
    from compressor.run.plug import unplug

    located = locate(model, fetch=True)
    display = told.display()
    with display.stage("unplug", len(located.source.checkpoint.entries)):
        done = unplug(
            located, output.expanduser(), pads=pads, emulator=emulator, progress=display.unit
        )
    line = f"{done.output}: {size(done.nbytes)}, {done.tensors} tensors"
    say(done.to_json(), [line], as_json=told.as_json)
