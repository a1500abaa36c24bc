"""compress eval"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.echo import say
from compressor.cli.junit import evaluation_cases, gate_cases
from compressor.cli.options import (
    Told,
    add_cases,
    checkpoint_options,
    device_option,
    telling_options,
)
from compressor.cli.several import gpus_option, joined_ranks, start_ranks

if TYPE_CHECKING:
    from compressor.evaluate.gate import GateResult
    from compressor.evaluate.passkey import PasskeyResult
    from compressor.evaluate.perplexity import Estimate, EvaluationResult, TaskScore


@click.command(name="eval")
@checkpoint_options
@click.option("--text", "data", default="bundled", help="bundled, a file, a folder or a Hub id.")
@click.option("--config", help="Configuration of a Hub data set.")
@click.option("--split", help="Split of a Hub data set or folder.  [default: test]")
@click.option("--revision", help="Commit, tag or branch of a Hub data set.")
@click.option("--text-field", help="Field that holds the text; looked for if not given.")
@click.option("--skip-bad-rows", is_flag=True, help="Pass over rows that cannot be used.")
@click.option("--windows", default=16, type=click.IntRange(1))
@click.option("--length", default=512, type=click.IntRange(8))
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Windows overlap and score only what the one before did not; the first WINDOWS x LENGTH "
    "tokens are scored once each.",
)
@click.option("--passkey", is_flag=True, help="Also probe the retrieval of a hidden passkey.")
@click.option(
    "--passkey-length",
    "lengths",
    type=click.IntRange(16),
    multiple=True,
    help="Tokens of the probe's rows, 512 and 1024 by default. Repeatable.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Multiple-choice task of lm-evaluation-harness, such as arc_easy. Repeatable.",
)
@click.option("--task-limit", type=click.IntRange(1), help="Documents of each task.")
@click.option(
    "--gate",
    "limits",
    multiple=True,
    metavar="NAME=LIMIT",
    help="A limit as under a recipe's gate: ppl, ppl_ratio, kl, top1, passkey, tasks.NAME. "
    "Repeatable.",
)
@click.option("--batch", default=4, type=click.IntRange(1))
@click.option(
    "--activation-store",
    metavar="FOLDER",
    help="Keep the original's hidden states here, and read those that are known.",
)
@device_option
@gpus_option
@telling_options
def command(
    checkpoint: Path,
    against: str | None,
    base: str | None,
    passkey: bool,
    lengths: tuple[int, ...],
    limits: tuple[str, ...],
    batch: int,
    activation_store: str | None,
    device: str,
    gpus: str | None,
    told: Told,
    **asked: Any,
) -> None:
    """Measure a checkpoint's written files: perplexity, KL to the original, top-1 agreement.

    Block by block, with one unit in memory, by our own reader of every format; inputs and KV
    cache are quantized as the checkpoint says. Exit code 1: a limit of --gate was missed.

    \b
    compress eval out/smollm2-135m-awq --against ~/.cache/compressor/smollm2-135m
    compress eval my-model --text my.txt --windows 64 --length 2048 --stride 512
    compress eval my-model --passkey --task arc_easy --task-limit 200
    compress eval out/smollm2-135m-awq --against ./smollm2-135m --gate ppl_ratio=1.2 --gate kl=0.2
    """
    start_ranks(gpus)

    from compressor.checkpoint.delta.source import open_model
    from compressor.checkpoint.find import locate
    from compressor.cli.limits import parse_gate
    from compressor.errors import InputError
    from compressor.evaluate.measure import measure
    from compressor.evaluate.passkey import Passkey
    from compressor.evaluate.perplexity import plain_json
    from compressor.evaluate.settings import Evaluation
    from compressor.plan.recipe import ActivationStore
    from compressor.run.activation_store import open_activations
    from compressor.run.alike import computing, require_alike
    from compressor.run.tokens import evaluation_tokens, passkey_text, skipped_notes
    from compressor.runner.tokenizer import load_tokenizer

    length, stride, tasks = asked["length"], asked["stride"], asked["tasks"]
    if stride is not None and stride >= length:
        raise InputError("--stride is not below --length", hint=f"at most {length - 1}")
    if tasks and find_spec("lm_eval") is None:
        raise InputError(
            "--task needs lm-evaluation-harness, which is not installed",
            hint="pip install 'compressor[harness]'",
        )
    gate = parse_gate(
        limits,
        against_original=against is not None,
        passkey=passkey or bool(lengths),
        tasks=tasks,
    )
    display = told.display()
    with joined_ranks(device) as (where, ranks):
        folder = ActivationStore(dir=activation_store) if activation_store else None
        source = open_model(checkpoint, base=base)
        original = locate(against, fetch=True).source if against else None
        probed = Passkey(**({"lengths": lengths} if lengths else {}))
        wanted = Evaluation(**asked, passkey=probed if passkey or lengths else None)
        tokenizer = load_tokenizer(checkpoint)
        cut = evaluation_tokens(tokenizer, wanted, calibration=None)
        for note in skipped_notes(None, cut):
            display.event("note", text=note)
        about = {**computing(where), "tokens": cut.sha256}
        require_alike(ranks, about, source, *([original] if original else []))
        # Several would write at once.
        kept = folder if ranks.world == 1 else None
        measured = measure(
            source,
            tokenizer,
            cut.ids,
            wanted,
            haystack=passkey_text(tokenizer, wanted),
            device=where,
            dtype=source.checkpoint.running_dtype(where),
            batch=lambda length: batch,
            stage=lambda name: display.stage(name, 0),
            against=original,
            activations=open_activations(
                kept, where, lambda text: display.event("note", text=text)
            ),
            progress=display.unit,
            ranks=ranks,
        )
    result, retrieved, answered = measured.evaluation, measured.passkey, measured.tasks
    found: dict[str, Any] = {"ok": True, **result.to_json()}
    if cut.skipped:
        found["skipped_rows"] = cut.skipped
    shown = lines(result)
    if retrieved is not None:
        found["passkey"] = retrieved.to_json()
        shown.append(passkey_line(retrieved))
    if tasks:
        found["tasks"] = plain_json({name: asdict(value) for name, value in answered.items()})
        shown += task_lines(answered)
    add_cases(evaluation_cases(result, retrieved, answered))
    if gate is not None:
        verdict = gate.check(result, passkey=retrieved, tasks=answered)
        add_cases(gate_cases(verdict))
        found |= {"ok": verdict.passed, "gate": verdict.to_json()}
        shown += [f"gate        {mark(verdict.passed)}", *limit_lines(verdict)]
    say(found, shown, as_json=told.as_json)
    click.get_current_context().exit(0 if found["ok"] else 1)


def estimate(found: Estimate) -> str:
    """A share with its standard error."""
    from compressor.report.text import share_with_error

    return share_with_error(asdict(found))


def passkey_line(found: PasskeyResult) -> str:
    """A probe for people."""
    return f"passkey     {estimate(found.accuracy)} of {found.tokens} tokens found"


def task_lines(tasks: Mapping[str, TaskScore]) -> list[str]:
    """Tasks of the harness for people."""
    return [
        f"{name:11} {estimate(value)} of {value.documents} documents"
        for name, value in tasks.items()
    ]


def mark(passed: bool) -> str:
    """A verdict in a word."""
    word = "passed" if passed else "FAILED"
    return click.style(word, fg="green" if passed else "red", bold=not passed)


def limit_lines(gate: GateResult) -> list[str]:
    """What each limit of a gate found."""
    return [
        f"            {'' if limit.passed else 'MISSED: '}{limit.message}" for limit in gate.checks
    ]


def lines(found: EvaluationResult) -> list[str]:
    """An evaluation for people."""
    from compressor.report.text import figure, with_error

    line = f"perplexity  {with_error(asdict(found.perplexity))}"
    if found.original_perplexity is not None and found.perplexity_ratio is not None:
        original, ratio = asdict(found.original_perplexity), asdict(found.perplexity_ratio)
        line += f"  (original {figure(original)}, ratio {with_error(ratio)})"
    shown = [line]
    if found.kl is not None and found.top1 is not None:
        shown.append(
            f"to original KL {with_error(asdict(found.kl))} nats, top-1 agreement "
            f"{estimate(found.top1)}"
        )
    shown.append(f"over        {found.tokens} tokens in {found.windows} windows of {found.length}")
    return shown
