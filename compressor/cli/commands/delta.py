"""compress delta"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.groups import Group
from compressor.cli.options import (
    FOLDER,
    MODEL,
    Told,
    folder_argument,
    json_option,
    shard_option,
    telling_options,
)


@click.group(cls=Group)
def command() -> None:
    """Work with deltas: fine-tunes stored as signs on top of their base.

    \b
    compress run recipes/llama2-bitdelta.yaml                   # make one
    compress delta diff out/vicuna-delta                        # what it holds
    compress delta apply ./llama2-7b out/vicuna-delta ./vicuna  # a dense model again
    """


@command.command()
@click.argument("base", type=MODEL)
@click.argument("delta", type=FOLDER)
@folder_argument("output")
@shard_option
@telling_options
def apply(
    base: str,
    delta: Path,
    output: Path,
    max_shard_size: int,
    told: Told,
) -> None:
    """Rebuild the dense fine-tune from BASE (folder, Hub id or GGUF file) and DELTA into OUTPUT.

    Every tensor that is taken from the base is compared with the hash the delta has of it, so
    another base is refused. The same command continues an interrupted one.

    \b
    compress delta apply ./llama2-7b out/vicuna-delta ./vicuna
    compress delta apply meta-llama/Llama-2-7b-hf out/vicuna-delta -o ./vicuna
    compress delta apply ./llama2-7b out/vicuna-delta ./vicuna --max-shard-size 2GB
    """
    from compressor.checkpoint.delta.source import find_base, open_delta
    from compressor.run.delta import apply_delta

    opened = open_delta(delta)
    source = find_base(opened, base)
    display = told.display()
    with display.stage("apply", len(source.layout.units)):
        count = apply_delta(
            opened,
            source,
            output,
            max_shard_size=max_shard_size,
            progress=display.unit,
        )
    line = f"{output}: {size(count)}, from a delta of {size(opened.checkpoint.nbytes)}"
    found = {"ok": True, "output": str(output), "bytes": count}
    say(found, [line], as_json=told.as_json)


@command.command()
@click.argument("delta", type=FOLDER)
@click.option(
    "--base", type=MODEL, help="Also say how large each difference is beside the base's weight."
)
@json_option
def diff(delta: Path, base: str | None, as_json: bool) -> None:
    """Say what DELTA holds: its base, signs and scales, full tensors, what it borrows.

    \b
    compress delta diff out/vicuna-delta
    compress delta diff out/vicuna-delta --base ./llama2-7b
    compress delta diff out/vicuna-delta --json > delta.json
    """
    show(delta, base=base, as_json=as_json)


def show(delta: Path, *, base: str | None, as_json: bool) -> None:
    """Print what a delta holds."""
    from compressor.checkpoint.delta.source import find_base, open_delta
    from compressor.run.delta import compare, describe

    opened = open_delta(delta)
    found = describe(opened)
    relative = compare(opened, find_base(opened, base)) if base else {}
    for name, value in relative.items():
        found["linears"][name]["relative"] = value
    say({"ok": True, **found}, lines(delta, found), as_json=as_json)


def lines(delta: Path, found: Mapping[str, Any]) -> list[str]:
    """A delta for people: the linears of one kind, over all blocks, in a line."""
    base = found["base"]
    pinned = f"@{base['revision']}" if "revision" in base else ""
    shown = [
        f"{delta}: {size(found['bytes'])}, a {found['model_type']} on top of "
        f"{base.get('name', 'an unnamed base')}{pinned}",
        f"  base fingerprint {base['fingerprint']}",
        f"  {found['signs']['linears']} linears as signs, {size(found['signs']['bytes'])}",
        f"  {found['full']['tensors']} tensors in full, {size(found['full']['bytes'])}",
        f"  {found['borrowed']['tensors']} tensors are the base's own",
    ]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in found["linears"].items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append(row)
    for kind, rows in kinds.items():
        scales = [row["scales"][0] for row in rows]
        line = f"    {kind:36} {len(rows):5} x {rows[0]['bits']} bit"
        line += f"  scale {min(scales):.3g} … {max(scales):.3g}"
        sizes = [row["relative"] for row in rows if "relative" in row]
        if sizes:
            line += f"  of the weight {min(sizes):.2%} … {max(sizes):.2%}"
        shown.append(line)
    return shown
