"""compress run"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.commands.eval import lines
from compressor.cli.display import Display, LogFormat, duration, size
from compressor.cli.options import device_options, json_option, log_option, recipe_options

if TYPE_CHECKING:
    from compressor.compile import Compiled, Prepared
    from compressor.job import UnitDone
    from compressor.verdict import Verdict


@click.command()
@recipe_options
@device_options
@click.option("--dry-run", is_flag=True, help="Stop after the plan; like compress plan.")
@log_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    recipe: Path,
    model: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    max_shard_size: str | None,
    device: str,
    device_memory: str | None,
    dry_run: bool,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Run a recipe: write the packed checkpoint, verify and evaluate it.

    The same command continues an interrupted run after the last finished unit, and leaves a
    finished output as it is. The exit code is 0 only if every check passed.

    \b
    compress run recipes/smollm2-awq.yaml
    compress run recipes/llama2-awq.yaml --model ./llama2 --output out/awq \\
        --set calibration.samples=64 --device cuda
    """
    if dry_run:
        from compressor.cli.commands.plan import command as plan

        context.invoke(
            plan,
            recipe=recipe,
            model=model,
            output=output,
            overrides=overrides,
            max_shard_size=max_shard_size,
            device=device,
            device_memory=device_memory,
            as_json=as_json,
        )
        return
    from compressor.cli.main import interruptible
    from compressor.compile import choose_device, compile_checkpoint, prepare
    from compressor.job import Interrupted
    from compressor.recipe import load_recipe, parse_size

    started = time.perf_counter()
    display = Display(log_format=log_format)
    loaded = load_recipe(
        recipe, overrides, model=model, output=output, max_shard_size=max_shard_size
    )
    prepared = prepare(
        loaded,
        device=choose_device(device),
        device_memory=parse_size(device_memory) if device_memory else None,
    )
    for note in prepared.plan.notes:
        display.event("note", text=note)

    def on_unit(done: UnitDone) -> None:
        fields: dict[str, Any] = {"seconds": done.seconds, "memory": done.peak_rss}
        if done.peak_device:
            fields["device"] = done.peak_device
        errors = [row["error"] for row in done.rows if row.get("error") is not None]
        if errors:
            fields["error"] = sum(errors) / len(errors)
        if done.resumed:
            fields["resumed"] = "yes"
        display.unit(done.name, done.index + 1, done.total, **fields)

    stopping = interruptible()
    try:
        with display.stage("compress", len(prepared.plan.units)):
            compiled = compile_checkpoint(prepared, on_unit=on_unit, stopping=stopping)
    except Interrupted:
        display.event("interrupted", hint="the same command continues after the last unit")
        context.exit(130)
    seconds = time.perf_counter() - started
    if compiled.already:
        display.event("already done", output=str(compiled.output))
    verdict = None
    if loaded.verify or loaded.evaluate is not None:
        # Imported only here: it brings kernels, which a run without checks does not need.
        from compressor.verdict import judge

        with display.stage("verify and evaluate", 0):
            verdict = judge(prepared, compiled)
    if as_json:
        result = summary(prepared, compiled, verdict, seconds=seconds)
        click.echo(json.dumps(result, indent=2))
    else:
        report(prepared, compiled, verdict, seconds=seconds)
    context.exit(0 if verdict is None or verdict.ok else 1)


def summary(
    prepared: Prepared, compiled: Compiled, verdict: Verdict | None, *, seconds: float
) -> dict[str, Any]:
    """What a machine wants to know of a run."""
    return {
        "ok": verdict is None or verdict.ok,
        "output": str(compiled.output),
        "already_done": compiled.already,
        "seconds": round(seconds, 3),
        "output_bytes": prepared.plan.output_bytes,
        "source_bytes": prepared.estimates.source_bytes,
        "peak_host_bytes": max((unit.peak_rss for unit in compiled.units), default=0),
        "peak_device_bytes": max((unit.peak_device for unit in compiled.units), default=0),
        "rows": [{"unit": unit.name, **row} for unit in compiled.units for row in unit.rows],
        **({} if verdict is None else verdict.to_json()),
    }


def report(
    prepared: Prepared, compiled: Compiled, verdict: Verdict | None, *, seconds: float
) -> None:
    """What a person wants to know of a run."""
    plan = prepared.plan
    before, after = prepared.estimates.source_bytes, plan.output_bytes
    click.echo(f"\n{compiled.output}")
    click.echo(f"  size        {size(after)} from {size(before)} ({before / after:.2f} times)")
    if compiled.units:
        rss = max(unit.peak_rss for unit in compiled.units)
        planned = prepared.estimates.host_bytes
        click.echo(f"  time        {duration(seconds)}")
        click.echo(f"  host peak   {size(rss)} (planned {size(planned)})")
        peak = max(unit.peak_device for unit in compiled.units)
        if peak:
            planned = prepared.estimates.device_bytes
            click.echo(f"  device peak {size(peak)} (planned {size(planned)})")
        rows = [row for unit in compiled.units for row in unit.rows if row.get("error") is not None]
        worst = sorted(rows, key=lambda row: -row["error"])[:3]
        for row in worst:
            click.echo(f"  high error  {row['linear']}  {row['error']:.4g}")
    if verdict is None:
        return
    if verdict.evaluation is not None:
        for line in lines(verdict.evaluation):
            click.echo(f"  {line}")
    if verdict.verified is not None:
        click.echo(f"  verify      {'passed' if verdict.verified.ok else 'FAILED'}")
