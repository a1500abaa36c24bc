"""compress convert"""

from contextlib import nullcontext
from pathlib import Path

import click

from compressor.cli.commands.verify import lines
from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.importing import uncollected
from compressor.cli.junit import Case, verify_cases
from compressor.cli.options import (
    MODEL,
    KnownName,
    Told,
    add_cases,
    device_option,
    folder_argument,
    known_formats,
    shard_option,
    telling_options,
)
from compressor.runner.driver import start_driver
from compressor.verify.apart import beside_gpu

SHOWN = 5


@click.command()
@click.argument("source", type=MODEL)
@folder_argument("output")
@click.option(
    "--format",
    "target",
    type=KnownName("text", known_formats),
    help="Format to write; dense dequantizes.",
)
@click.option(
    "--unpickle",
    is_flag=True,
    help="SOURCE is a folder of pickled weights (.bin), which are programs: run them in PyTorch's "
    "restricted loader, in a process with limits, and write safetensors. For sources you trust.",
)
@click.option(
    "--allow-rounding",
    is_flag=True,
    help="Write the nearest value where none is exact; say so.",
)
@shard_option
@click.option(
    "--verify/--no-verify", "verifying", default=True, help="Reopen the files and prove them."
)
@device_option
@telling_options
def command(
    source: str,
    output: Path,
    target: str | None,
    unpickle: bool,
    allow_rounding: bool,
    max_shard_size: int,
    verifying: bool,
    device: str,
    told: Told,
) -> None:
    """Write a checkpoint in another format without choosing its codes again.

    SOURCE is a checkpoint folder, a GGUF file or a Hub id; OUTPUT a new folder. Codes never
    change; a value without an exact form in the target is refused by name, or rounded and reported
    with --allow-rounding. `--format dense` writes the weights that the codes stand for. The files
    are then verified against the source, as `compress verify --against SOURCE` does; exit code 1:
    they are damaged.

    \b
    compress convert out/llama2-awq out/llama2-autoawq --format autoawq
    compress convert out/llama2-awq -o out/llama2-float --format dense
    compress convert --unpickle ./mpt-7b ./mpt-7b-safetensors
    """
    display = told.display()
    if unpickle:
        if target is not None:
            raise click.UsageError("--unpickle writes the weights as they are: leave out --format")
        from compressor.checkpoint.pickles import convert_pickles

        folder = Path(source).expanduser()
        with display.stage("unpickle", max(1, len(list(folder.glob("pytorch_model*.bin"))))):
            written = convert_pickles(folder, output.expanduser(), progress=display.unit)
        made = {"ok": True, "files": [str(path) for path in written]}
        say(made, [f"{output}: {len(written)} files of safetensors"], as_json=told.as_json)
        return
    start_driver(device)
    beside = beside_gpu(device) if verifying else nullcontext()
    apart = click.get_current_context().with_resource(beside)
    with uncollected():
        from compressor.checkpoint.find import locate
        from compressor.formats.base import format_names, get_format
        from compressor.run.convert import convert
        from compressor.run.session import choose_device

    if target is None:
        raise click.UsageError(f"--format names what to write: {', '.join(format_names())}")
    get_format(target)
    where = choose_device(device)
    located = locate(source, fetch=True)
    with display.stage("convert", (3 if verifying else 2) * len(located.source.layout.units)):
        done = convert(
            located,
            output.expanduser(),
            format=target,
            allow_rounding=allow_rounding,
            max_shard_size=max_shard_size,
            device=where,
            verifying=verifying,
            progress=display.unit,
            apart=apart if where.type == "cuda" else None,
        )
    rounded = "\n".join(f"rounded {report}" for report in done.rounded)
    add_cases([Case("convert", f"{done.source_format} to {done.target_format}", output=rounded)])
    if done.verified is not None:
        add_cases(verify_cases(done.verified))
    shown = [f"{done.output}: {done.source_format} to {done.target_format}, {size(done.nbytes)}"]
    if done.already:
        shown.append("  it was finished before and is left as it is")
    shown += [f"  note: {note}" for note in done.notes]
    if not done.rounded:
        shown.append("  nothing was rounded" if target != "dense" else "  dequantized")
    worst = sorted(done.rounded, key=lambda r: -r.max_relative_error)[:SHOWN]
    shown += [f"  rounded {report}" for report in worst]
    if len(done.rounded) > SHOWN:
        shown.append(f"  and {len(done.rounded) - SHOWN} more tensors, rounded by less")
    shown += [] if done.verified is None else lines(done.verified)
    say({"ok": done.ok, **done.to_json()}, shown, as_json=told.as_json)
    click.get_current_context().exit(0 if done.ok else 1)
