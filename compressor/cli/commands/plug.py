"""compress plug"""

from pathlib import Path

import click

from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.options import FOLDER, MODEL, PADS, Told, folder_argument, telling_options


@click.command()
@click.argument("base", type=MODEL)
@click.argument("adapter", type=FOLDER)
@folder_argument("output")
@click.option(
    "--emulator",
    type=FOLDER,
    help="The emulator that was tuned, where ADAPTER has no offsite.json: trainers don't copy it.",
)
@click.option("--pads", type=PADS, help="For adapter.pt: its first and last blocks, such as 2,2.")
@click.option(
    "--unpickle",
    is_flag=True,
    help="Load ADAPTER though it is a pickle: tensors alone, in a process of its own with limits. "
    "Only from whom you trust.",
)
@telling_options
def command(
    base: str,
    adapter: Path,
    output: Path,
    emulator: Path | None,
    pads: tuple[int, int] | None,
    unpickle: bool,
    told: Told,
) -> None:
    """Put an adapter that was tuned on an emulator into its full model.

    BASE is the full model, OUTPUT a new folder. ADAPTER is the tuned emulator, peft's LoRA weights
    for it (which are merged), what `compress unplug` wrote, or an adapter.pt of the published code.
    Every tensor outside the adapter keeps its bytes, and every file its layout. Refused, before
    anything is written: an adapter of another model, tensors that are missing, left over or not
    finite, and tuned ones outside the adapter, such as a head that shares the embedding. The same
    command continues an interrupted one. docs/methods/emulator.md has the whole way.

    \b
    compress plug ./llama2-7b ./tuned ./llama2-7b-mine --emulator out/emulator
    compress plug ./llama2-7b ./lora ./llama2-7b-mine --emulator out/emulator
    compress plug ./opt-1.3b adapter.pt ./opt-mine --pads 2,2 --unpickle
    """
    from compressor.checkpoint.adapter import open_adapter
    from compressor.checkpoint.find import locate
    from compressor.run.plug import plug

    located = locate(base, fetch=True)
    found = open_adapter(
        adapter.expanduser(), located.source, emulator=emulator, pads=pads, unpickle=unpickle
    )
    display = told.display()
    with display.stage("plug", len(located.source.checkpoint.entries)):
        done = plug(located, found, output.expanduser(), progress=display.unit)
    line = f"{done.output}: {size(done.nbytes)}, {done.tensors} tensors from {adapter}"
    notes = (f"  note: {note}" for note in done.notes)
    say(done.to_json(), [line, *notes], as_json=told.as_json)
