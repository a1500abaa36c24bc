"""compress inspect"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.display import size
from compressor.cli.echo import echo
from compressor.cli.options import json_option

if TYPE_CHECKING:
    from compressor.inspect_checkpoint import CheckpointInfo, LayerInfo


@click.command()
@click.argument("checkpoint")
@click.option("--layers", is_flag=True, help="One line for each linear.")
@json_option
def command(checkpoint: str, layers: bool, as_json: bool) -> None:
    """Show what is in a checkpoint: architecture, format, bits, schemes, sizes, origin.

    CHECKPOINT is a folder, a GGUF file, or a Hub id, of which headers are read over the network
    and no weights. Of a delta it shows what compress delta diff does.

    \b
    compress inspect out/smollm2-135m-awq
    compress inspect meta-llama/Llama-2-7b-hf --json
    """
    from compressor.delta_source import is_delta
    from compressor.inspect_checkpoint import inspect
    from compressor.locate import locate

    folder = Path(checkpoint).expanduser()
    if is_delta(folder):
        from compressor.cli.commands.delta import show

        show(folder, base=None, as_json=as_json)
        return
    info = inspect(locate(checkpoint, fetch=False))
    if as_json:
        echo(json.dumps({"ok": True, **info.to_json()}, indent=2))
        return
    for line in lines(info, every=layers):
        echo(line)


def lines(info: CheckpointInfo, *, every: bool = False) -> list[str]:
    """A checkpoint for people."""
    bits = 8 * info.nbytes / max(info.parameters, 1)
    shown = [
        info.name,
        f"  model       {info.model_type}, {info.blocks} blocks, {info.parameters:,} parameters",
        f"  format      {info.format}, floats in {info.dtype}",
        f"  size        {size(info.nbytes)} in {info.shards} files, {info.tensors} tensors "
        f"({bits:.2f} bits a parameter)",
    ]
    if info.quantized:
        packed = 8 * info.quantized_bytes / info.quantized
        share = info.quantized / info.parameters
        shown.append(f"  quantized   {share:.1%} of the parameters, {packed:.3f} bits each")
    if info.tied:
        shown.append(f"  tied        lm_head shares {info.tied}")
    if info.kv:
        shown.append(f"  KV cache    {info.kv}")
    shown += [f"  attention   {line}" for line in info.policy]
    shown += [f"  note        {line}" for line in info.notes]
    if info.added:
        leaves = Counter(name.rpartition(".")[2] for name in info.added)
        shown.append("  added       " + ", ".join(f"{n} {leaf}" for leaf, n in leaves.items()))
    if info.about and info.about.get("recipe"):
        recipe = info.about["recipe"]
        passes = ", ".join(name for step in recipe.get("passes", ()) for name in step)
        shown.append(f"  made from   {recipe.get('model')} by {passes}")
    groups: dict[str, list[LayerInfo]] = defaultdict(list)
    for layer in info.layers:
        groups[layer.scheme].append(layer)
    shown.append("  linears")
    for scheme, members in groups.items():
        roles = ", ".join(f"{n} {role}" for role, n in Counter(x.role for x in members).items())
        shown.append(f"    {len(members):>5}  {scheme}: {roles}")
    if every:
        width = max(len(layer.name) for layer in info.layers)
        for layer in info.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            shown.append(
                f"  {layer.name:<{width}}  {shape:>14}  {layer.bits_per_weight:6.3f} bits  "
                f"{layer.scheme}"
            )
    return shown
