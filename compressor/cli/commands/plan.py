"""compress plan"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.display import duration, size
from compressor.cli.echo import echo
from compressor.cli.importing import uncollected
from compressor.cli.junit import Case
from compressor.cli.options import (
    add_cases,
    device_options,
    json_option,
    junit_option,
    recipe_options,
)
from compressor.cli.several import gpus_option, ranks_to_start

MANY = 8
"""Patterns of a pass that are listed."""

if TYPE_CHECKING:
    from compressor.audit.settings import AuditSettings
    from compressor.plan.estimate import Estimates
    from compressor.plan.plan import Plan
    from compressor.plan.recipe import Recipe


@click.command()
@recipe_options
@device_options
@gpus_option
@junit_option
@json_option
def command(**options: Any) -> None:
    """Show what a run would do and cost, and everything that is wrong with it.

    Reads config.json, tensor headers and the first rows of the data (from the Hub over the
    network): no weights, no GPU. All problems are listed at once; the exit code is 2 if there are
    any. With --gpus it says which part each of so many would have.

    \b
    compress plan recipes/llama2-awq.yaml --gpus 4
    compress plan recipes/llama2-awq.yaml --model ./my-model --set passes.awq.group_size=64
    compress plan recipes/llama2-awq.yaml --for 'vllm@0.24, tp: 2, gpu: h100' --json
    """
    # What is made of tens of thousands of experts' headers stays until the end.
    with uncollected():
        show_plan(**options)


def show_plan(
    asked: Callable[[], Recipe],
    *,
    device: str,
    device_memory: int | None,
    gpus: str | None,
    as_json: bool,
) -> None:
    """Make it, and say all of it. Raises Problems with everything that is wrong."""
    import torch

    from compressor.checkpoint.find import locate
    from compressor.errors import Problems
    from compressor.plan.estimate import estimate
    from compressor.plan.plan import make_plan
    from compressor.plan.preflight import preflight
    from compressor.plan.unit_plan import DTYPES
    from compressor.run.tokens import check_data
    from compressor.runner.process_memory import rss

    world, resident = ranks_to_start(gpus), rss()
    loaded = asked()
    located = locate(
        loaded.model,
        fetch=False,
        to_plan=True,
        dtype=DTYPES.get(loaded.dtype),
        chosen=loaded.map,
    )
    plan = make_plan(
        loaded,
        located.source,
        output=Path(loaded.output).expanduser(),
        beside=located.beside,
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    costs = estimate(
        plan,
        device=torch.device(device),
        resident=resident,
        device_memory=device_memory,
        world=world,
    )
    problems, notes = check_data(plan)
    problems += preflight(plan)[1]
    if problems:
        raise Problems(problems)
    plan = replace(plan, notes=(*plan.notes, *notes))
    add_cases([Case("plan", "recipe and model", output="\n".join(plan.notes))])
    if as_json:
        echo(json.dumps({"ok": True, **describe(plan, costs, world)}, indent=2))
    else:
        show(plan, costs, world, device=device)


def describe(plan: Plan, costs: Estimates, world: int) -> dict[str, Any]:
    """The plan as plain data, for so many ranks."""
    from compressor.plan.shares import led, shares

    spread = costs.alone > 0
    return {
        "model_type": plan.layout.model_type,
        "recipe": plan.recipe.resolved(),
        "passes": [
            {
                "pass": p.step.name,
                "matches": dict(p.matches),
                "ignored": dict(p.ignored),
                "linears": len(p.names),
            }
            for p in plan.passes
        ],
        "schemes": {name: plan.target.describe(name) for name in plan.schemes.linears},
        "units": len(plan.units),
        "shards": {shard.file: shard.size for shard in plan.shards.shards},
        "estimates": costs.to_json(),
        "notes": list(plan.notes),
        "ranks": [asdict(share) for share in shares(plan, world, costs.batch, spread=spread)],
        "led": led(plan),
    }


def show(plan: Plan, costs: Estimates, world: int, *, device: str) -> None:
    """The plan for people."""
    from compressor.plan.shares import in_words, led, shares

    recipe, source = plan.recipe, plan.source
    parameters = sum(math.prod(entry.spec.shape) for entry in source.checkpoint.entries.values())
    echo(
        f"{recipe.model}: {plan.layout.model_type}, {len(plan.layout.blocks)} blocks, "
        f"{parameters / 1e6:.1f} M parameters, {source.checkpoint.dtype}".replace("torch.", "")
    )
    for number, entry in enumerate(plan.passes, 1):
        echo(f"pass {number}: {entry.step.name}, {len(entry.names)} linears")
        patterns("target", entry.matches)
        patterns("ignore", entry.ignored)
    echo(f"format: {plan.target.format.name}")
    for line in layers(plan):
        echo(line)
    if plan.calibrated:
        wanted = recipe.calibration
        echo(
            f"calibration: {wanted.samples} x {wanted.length} tokens of {wanted.name}, "
            f"{costs.batch} rows at a time"
        )
    if recipe.audit is not None:
        echo(f"audit: {audit_line(recipe.audit, plan.layout.sizes.vocabulary)}")
    files = len(plan.shards.shards)
    echo(
        f"output: {recipe.output}, {size(costs.output_bytes)} in {files} "
        f"file{'s' if files > 1 else ''} (source {size(costs.source_bytes)}, "
        f"{costs.source_bytes / costs.output_bytes:.2f} times smaller)"
    )
    echo(f"peak memory: host {size(costs.host_bytes)}, device {size(costs.device_bytes)}")
    if costs.experts_apart:
        echo("experts: in main memory, some at a time on the device, which has no room for all")
    if costs.alone:
        echo(f"experts: spread over {world} ranks; with all of them one takes {size(costs.alone)}")
    echo(f"time on {device}: about {duration(costs.seconds)}{' of one rank' * (world > 1)}")
    if world > 1:
        found = shares(plan, world, costs.batch, spread=costs.alone > 0)
        for line in in_words(found, led(plan)):
            echo(line)
    for note in plan.notes:
        echo(f"note: {note}")


def audit_line(wanted: AuditSettings, vocabulary: int) -> str:
    """What is audited, and how much of it."""
    what = [name for name in ("model", "written") if wanted.looks_at(name)]
    tried = min(wanted.tokens or vocabulary, vocabulary)
    how = "tensors alone" if wanted.weights_only else f"{tried} of {vocabulary} tokens tried"
    ends = "exit 1 where suspect" if wanted.fails else "only reported"
    return f"{' and '.join(what)}, {how}, {ends}"


def patterns(what: str, counts: Mapping[str, int]) -> None:
    """What each pattern of a pass matches; of many only the first ones."""
    for pattern, count in list(counts.items())[:MANY]:
        echo(f"  {what} {pattern!r} matches {count}")
    if len(counts) > MANY:
        echo(f"  and {len(counts) - MANY} more, of which each {what}s one or more linears")


def layers(plan: Plan) -> list[str]:
    """What every linear becomes, by role; where a role has several forms, in which blocks."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for unit in plan.layout.units:
        block = unit.index if unit.kind == "block" else None
        for linear in unit.linears:
            groups.setdefault((linear.role, plan.target.describe(linear.name)), []).append(block)
    forms = Counter(role for role, _ in groups)
    first = {role: place for place, role in enumerate(dict.fromkeys(role for role, _ in groups))}
    lines = []
    for (role, text), blocks in sorted(groups.items(), key=lambda entry: first[entry[0][0]]):
        line = f"  {role:12} {len(blocks):5} x {text}"
        if forms[role] > 1:
            line += f", blocks {ranges(sorted({b for b in blocks if b is not None}))}"
        lines.append(line)
    kv = plan.schemes.kv
    if kv is not None:
        lines.append(
            f"  KV cache           {kv.element}, scales per {kv.per.replace('_', ' and ')}"
        )
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
