"""compress inspect"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.options import MODEL, json_option, runtime_option

if TYPE_CHECKING:
    from compressor.checkpoint.find import Located
    from compressor.errors import InputError
    from compressor.report.inspect import CheckpointInfo, LayerInfo
    from compressor.runtimes.contract import Runtime


@click.command()
@click.argument("checkpoint", type=MODEL)
@click.option("--layers", is_flag=True, help="One line for each linear.")
@runtime_option
@json_option
@click.pass_context
def command(
    context: click.Context, checkpoint: str, layers: bool, runtime: str | None, as_json: bool
) -> None:
    """Show what is in a checkpoint: architecture, format, bits, schemes, sizes, origin.

    CHECKPOINT is a folder, a GGUF file, or a Hub id, of which headers are read over the network
    and no weights. Of a delta it shows what compress delta diff does. With --for it says whether
    a runtime loads it, and the exit code is 1 where that one does not.

    \b
    compress inspect out/smollm2-135m-awq
    compress inspect out/smollm2-135m-awq --for sglang
    compress inspect meta-llama/Llama-2-7b-hf --json
    """
    from compressor.checkpoint.delta.source import is_delta
    from compressor.checkpoint.find import locate
    from compressor.report.inspect import inspect, stored_form
    from compressor.runtimes.contract import parse_runtime
    from compressor.runtimes.loads import loads

    folder = Path(checkpoint).expanduser()
    if is_delta(folder):
        from compressor.cli.commands.delta import show

        show(folder, base=None, as_json=as_json)
        return
    asked = None if runtime is None else parse_runtime(runtime)
    located = locate(checkpoint, fetch=False)
    info = inspect(located)
    reasons = [] if asked is None else loads(asked, stored_form(located.source))
    found = {"ok": not reasons, **info.to_json()}
    if asked is not None:
        told = [{"message": error.message, "hint": error.hint} for error in reasons]
        found["for"] = {**asked.model_dump(), "loads": not reasons, "reasons": told}
    shown = lines(info, every=layers)
    if asked is not None:
        shown += verdict(asked, reasons, located)
    say(found, shown, as_json=as_json)
    if reasons:
        context.exit(1)


def verdict(runtime: Runtime, reasons: Sequence[InputError], located: Located) -> list[str]:
    """Whether a runtime loads a checkpoint, for people."""
    from compressor.report.inspect import stored_form
    from compressor.runtimes.loads import remarks

    if not reasons:
        found = remarks(runtime, stored_form(located.source))
        return [f"  loads in    {line}" for line in found or [runtime.title]]
    shown = []
    for error in reasons:
        shown.append(f"  no          {error.message}")
        if error.hint:
            shown.append(f"              {error.hint}")
    return shown


def lines(info: CheckpointInfo, *, every: bool = False) -> list[str]:
    """A checkpoint for people."""
    bits = 8 * info.nbytes / max(info.parameters, 1)
    shown = [
        info.name,
        f"  model       {info.model_type}, {info.blocks} blocks, {info.parameters:,} parameters",
        f"  format      {info.format}, floats in {info.dtype}",
        f"  size        {size(info.nbytes)} in {info.shards} file{'s' * (info.shards > 1)}, "
        f"{info.tensors} tensors "
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
    for part in info.beside:
        more = f", {part.linears} linears (targets: {part.kind}.*)" if part.linears else ""
        about = f"{part.path}: {part.tensors} tensors, {size(part.nbytes)}{more}"
        shown.append(f"  {part.kind:<11} {about}")
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
