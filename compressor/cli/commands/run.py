"""compress run"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.commands.audit import cases as audit_cases
from compressor.cli.commands.eval import limit_lines, lines, mark, passkey_line, task_lines
from compressor.cli.display import Display, duration, size
from compressor.cli.echo import echo
from compressor.cli.importing import uncollected
from compressor.cli.junit import ENDED, Case, verdict_cases
from compressor.cli.options import (
    Told,
    add_cases,
    again_option,
    device_options,
    recipe_options,
    telling_options,
)
from compressor.cli.several import gpus_option, joined_ranks, start_ranks
from compressor.report.notes import kept_rows, row_notes
from compressor.runner.driver import start_driver

if TYPE_CHECKING:
    import torch

    from compressor.audit.findings import Audit
    from compressor.plan.recipe import Recipe
    from compressor.ranks.ranks import Ranks
    from compressor.report.publish import Pushed
    from compressor.run.judge import Verdict
    from compressor.run.release import Released
    from compressor.run.session import Compiled, Prepared
    from compressor.run.settings import UnitDone

WORST = 3
"""Linears with the largest errors that a run names."""


@click.command()
@recipe_options
@device_options
@gpus_option
@again_option
@click.option("--dry-run", is_flag=True, help="Stop after the plan; like compress plan.")
@telling_options
def command(
    asked: Callable[[], Recipe],
    device: str,
    device_memory: int | None,
    gpus: str | None,
    again: bool,
    dry_run: bool,
    told: Told,
) -> None:
    """Run a recipe: write the packed checkpoint, verify and evaluate it, hold it to the gate.

    The same command continues an interrupted run after the last finished unit. A finished output
    is left as it is, and judged again unless it passed and all hashes (its files, the source, the
    recipe, the text) are those of its report. The exit code is 0 only if every check passed. A
    failed one keeps the files; report.html beside them says what was found.

    \b
    compress run recipes/smollm2-awq.yaml
    compress run recipes/llama2-awq.yaml --model ./llama2 --output out/awq \\
        --set calibration.samples=64 --device cuda
    compress run recipes/smollm2-awq.yaml --for 'vllm, tp: 2' --dry-run
    """
    if dry_run:
        from compressor.cli.commands.plan import show_plan

        show_plan(
            asked, device=device, device_memory=device_memory, gpus=gpus, as_json=told.as_json
        )
        return
    start_ranks(gpus)
    start_driver(device)
    with uncollected():
        loaded = asked()
    run_recipe(loaded, device=device, device_memory=device_memory, again=again, told=told)


def run_recipe(
    recipe: Recipe, *, device: str, device_memory: int | None, again: bool, told: Told
) -> None:
    """Run it, say what came of it, and end with the exit code that stands for that."""
    display = told.display()
    with joined_ranks(device) as (chosen, ranks):
        run = execute(
            recipe,
            device=chosen,
            device_memory=device_memory,
            again=again,
            display=display,
            ranks=ranks,
        )
        code = ranks.share(130 if run is None else 0 if run.ok else 1)
    if not ranks.leads:
        click.get_current_context().exit(code)
    if run is None:
        if told.as_json:
            ended = {"message": "interrupted", "hint": "the same command continues"}
            echo(json.dumps({"ok": False, "exit_code": 130, "errors": [ended]}, indent=2))
        click.get_current_context().exit(130)
    if told.as_json:
        echo(json.dumps(summary(run), indent=2))
    else:
        report(run)
    click.get_current_context().exit(code)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that came to its end: what was made, what was found, where it went."""

    prepared: Prepared
    compiled: Compiled
    released: Released
    pushed: Pushed | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Every check passed."""
        return self.released.verdict.ok


def execute(
    recipe: Recipe,
    *,
    device: torch.device,
    device_memory: int | None,
    again: bool,
    display: Display,
    ranks: Ranks,
) -> Run | None:
    """Compile, judge and release; None where Ctrl-C or SIGTERM stopped it, and on ranks that do not
    lead.

    again  a finished checkpoint is judged also where an earlier verdict still holds
    """
    started = time.perf_counter()
    with uncollected():
        from compressor.cli.main import interruptible
        from compressor.errors import Interrupted
        from compressor.run.session import compile_checkpoint, prepare
        from compressor.run.tokens import skipped_notes
        from compressor.runner.process_memory import rss

        resident = rss()
        if recipe.publish is not None:
            from compressor.report.publish import check_token

            check_token()
        prepared = prepare(
            recipe,
            device=device,
            device_memory=device_memory,
            resident=resident,
            world=ranks.world,
        )
    add_cases([Case("plan", "recipe and model", seconds=time.perf_counter() - started)])
    skipped = skipped_notes(prepared.calibration, prepared.evaluation)
    for note in [*prepared.plan.notes, *skipped]:
        display.event("note", text=note)
    try:
        with interruptible() as stopping, display.stage("compress", len(prepared.plan.units)):
            compiled = compile_checkpoint(
                prepared,
                on_unit=partial(show_unit, display, prepared),
                on_step=display.unit,
                on_note=lambda text: display.event("note", text=text),
                on_fit=display.within,
                stopping=stopping,
                ranks=ranks,
            )
            if ranks.any(stopping()):
                raise Interrupted
    except Interrupted:
        display.event("interrupted", hint="the same command continues after the last unit")
        add_cases([Case("compress", ENDED, error="interrupted")])
        return None
    before = None
    if compiled.already and not again:
        from compressor.run.standing import standing

        with display.stage("compare", len(prepared.plan.units)):
            before = ranks.led(lambda: standing(prepared, compiled.output, progress=display.unit))
    if not ranks.leads:
        if before is None:
            from compressor.run.judge import judge

            judge(prepared, compiled, ranks=ranks)
        return None
    seconds = time.perf_counter() - started
    add_cases([Case("compress", "checkpoint written", seconds=seconds)])
    decides = recipe.audit is not None and recipe.audit.fails
    if compiled.audit is not None:
        add_cases(audit_cases(compiled.audit, "of the model", decides=decides))
    if compiled.already:
        since = {} if before is None else {"verdict": f"of {before.since}"}
        display.event("already done", output=str(compiled.output), **since)
    # Imported only here: it brings kernels, which nothing needs before.
    from compressor.run.release import conclude

    released = conclude(
        prepared, compiled, seconds=seconds, before=before, watch=display, ranks=ranks
    )
    add_cases(verdict_cases(released.verdict))
    if released.verdict.audit is not None:
        written = audit_cases(released.verdict.audit, "of what was written", decides=decides)
        add_cases(written)
    pushed = None
    if recipe.publish is not None and released.verdict.ok:
        from compressor.report.publish import list_upload, push

        listing = list_upload(compiled.output)
        with display.stage("upload", len(listing.files)):
            pushed = push(listing, recipe.publish, progress=display.unit)
        add_cases([Case("publish", recipe.publish.repo, output=f"commit {pushed.commit}")])
    return Run(
        prepared=prepared,
        compiled=compiled,
        released=released,
        pushed=pushed,
        seconds=time.perf_counter() - started,
    )


def show_unit(display: Display, prepared: Prepared, done: UnitDone) -> None:
    """One more unit of a run."""
    fields: dict[str, Any] = {}
    errors = [row["error"] for row in done.rows if row.get("error") is not None]
    if errors:
        fields["error"] = sum(errors) / len(errors)
    linears = prepared.plan.units[done.index].layout.linears
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    if weights and not done.resumed:
        fields["rate"] = weights / max(done.seconds, 1e-6)
    fields |= {"seconds": done.seconds, "memory": done.peak_rss}
    if done.peak_device:
        fields["device"] = done.peak_device
    if done.resumed:
        fields["resumed"] = "yes"
    display.unit(done.name, done.index + 1, done.total, **fields)


def summary(run: Run) -> dict[str, Any]:
    """What a machine wants to know of a run."""
    from compressor.run.release import activations_json, audits_json

    units, planned = run.released.units, run.prepared.estimates
    return {
        "ok": run.ok,
        "output": str(run.compiled.output),
        "already_done": run.compiled.already,
        "judged_before": run.released.since,
        "seconds": round(run.seconds, 3),
        "output_bytes": run.prepared.plan.shards.size,
        "source_bytes": planned.source_bytes,
        "peak_host_bytes": run.released.host_bytes,
        "peak_device_bytes": max((unit.peak_device for unit in units), default=0),
        "planned_host_bytes": planned.host_bytes,
        "planned_device_bytes": planned.device_bytes,
        "activations": activations_json(run.prepared),
        "rows": [{"unit": unit.name, **row} for unit in units for row in unit.rows],
        **run.released.verdict.to_json(),
        "audit": audits_json(run.compiled, run.released.verdict),
        "report": str(run.released.report) if run.released.report else None,
        "card_kept": run.released.card_kept,
        "published": None if run.pushed is None else asdict(run.pushed),
    }


def report(run: Run) -> None:
    """What a person wants to know of a run."""
    planned, after = run.prepared.estimates, run.prepared.plan.shards.size
    before, units = planned.source_bytes, run.released.units
    echo(f"\n{run.compiled.output}")
    echo(f"  size        {size(after)} from {size(before)} ({before / after:.2f} times)")
    if run.compiled.units:
        echo(f"  time        {duration(run.seconds)}")
        echo(f"  host peak   {size(run.released.host_bytes)} (planned {size(planned.host_bytes)})")
        peak = max(unit.peak_device for unit in units)
        if peak:
            echo(f"  device peak {size(peak)} (planned {size(planned.device_bytes)})")
    if (kept := run.prepared.activations) is not None:
        echo(f"  activations {kept.read} of {kept.read + kept.ran} rows through a block were read")
    rows = [row for unit in units for row in unit.rows]
    for line in [*kept_rows(rows), *row_notes(rows)]:
        echo(f"  noted       {line}")
    if run.compiled.audit is not None:
        for line in audit_lines("of the model", run.compiled.audit):
            echo(f"  {line}")
    show_verdict(run.released.verdict, rows)
    if run.released.since is not None:
        echo(f"  unchanged   since it was judged, {run.released.since}; --again judges anew")
    if run.released.report is not None:
        echo(f"  report      {run.released.report}")
    if run.released.card_kept:
        echo("  card        README.md was edited by hand and stays as it is")
    if run.pushed is not None:
        echo(f"  published   {run.pushed.url}  commit {run.pushed.commit}")
    elif run.prepared.recipe.publish is not None:
        echo(f"  published   {mark(False)}: only what passes goes up; compress push --force")


def audit_lines(what: str, found: Audit) -> list[str]:
    """The verdict of an audit, and what was found."""
    told = [f"            {f.level} {f.tensor} {f.message}" for f in found.findings]
    return [f"audit       {found.verdict}, {what}", *told]


def show_verdict(verdict: Verdict, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was found, and where the error is."""
    from compressor.evaluate.gate import rank_layers
    from compressor.report.text import relative_error

    if verdict.evaluation is not None:
        for line in lines(verdict.evaluation):
            echo(f"  {line}")
    if verdict.passkey is not None:
        echo(f"  {passkey_line(verdict.passkey)}")
    for line in task_lines(verdict.tasks):
        echo(f"  {line}")
    for layer in rank_layers(rows)[:WORST]:
        share = f"{layer.share:.1%} of all" if layer.share else ""
        echo(f"  high error  {layer.linear}  {relative_error(layer.error)}  {share}".rstrip())
    if verdict.verified is not None:
        echo(f"  verify      {mark(verdict.verified.ok)}")
        for check in verdict.verified.checks:
            if not check.ok:
                echo(f"              {check.name}: {check.detail}")
    if verdict.audit is not None:
        for line in audit_lines("of what was written", verdict.audit):
            echo(f"  {line}")
    if verdict.gate is None:
        return
    echo(f"  gate        {mark(verdict.gate.passed)}")
    for line in limit_lines(verdict.gate):
        echo(f"  {line}")
    if verdict.gate.suggestion:
        echo(
            "\nThe files are kept. More bits where most of the error is; in the recipe:\n\n"
            + verdict.gate.suggestion
        )
