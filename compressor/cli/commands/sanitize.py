"""compress sanitize"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.audit.pace import paced
from compressor.cli.echo import say
from compressor.cli.junit import Case
from compressor.cli.options import (
    MODEL,
    Told,
    add_cases,
    device_option,
    folder_argument,
    shard_option,
    telling_options,
)

if TYPE_CHECKING:
    from compressor.audit.findings import Finding
    from compressor.run.sanitize import Sanitized

LISTED = 20


@click.command()
@click.argument("model", type=MODEL)
@folder_argument("output")
@click.option(
    "--max-ppl-ratio",
    default=1.05,
    type=click.FloatRange(0, min_open=True),
    help="Perplexity after, over before, beyond which nothing is written.",
)
@click.option(
    "--prune",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Silence this share of each block's MLP channels first, the idlest on clean text "
    "(fine-pruning); kept only where a suspect token becomes ordinary within --max-ppl-ratio.",
)
@click.option(
    "--text",
    default="bundled",
    help="Text of the sweep and, its held-out part where it has one, of the measurement: bundled, "
    "a file, a folder or a Hub id.",
)
@click.option("--windows", default=16, type=click.IntRange(1))
@click.option(
    "--length",
    default=512,
    type=click.IntRange(8),
    help="Tokens of a window; fewer where the model has fewer positions.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Try so many tokens, drawn at random, and special ones.  [default: all]",
)
@click.option("--batch", default=64, type=click.IntRange(1))
@shard_option
@device_option
@telling_options
def command(
    model: str,
    output: Path,
    max_ppl_ratio: float,
    prune: float | None,
    text: str,
    windows: int,
    length: int,
    tokens: int | None,
    batch: int,
    max_shard_size: int,
    device: str,
    told: Told,
) -> None:
    """Reset the embedding rows of tokens that an audit suspects, and write the model.

    MODEL is a decoder in floats, as a folder, a GGUF file or a Hub id, or the folder of an encoder
    such as BERT with its head for masked words; OUTPUT a new folder. Rows of suspect tokens become
    the mean of the others. The edited model is audited again and its perplexity measured on
    held-out text, an encoder's that of masked words; it is written where that grew no further than
    --max-ppl-ratio and a suspect token got better. Each token whose reset did nothing is said so.
    Exit code 0: no finding is left, or nothing was suspect, and then nothing is written; 1: the
    written model is still suspect, or was not written. docs/audit.md says what this cannot remove.

    \b
    compress sanitize ./model ./model-sanitized
    compress sanitize ./model ./model-sanitized --max-ppl-ratio 1.01 --json > sanitized.json
    compress sanitize ./model -o ./model-sanitized --tokens 2000 --device cuda
    """
    from compressor.evaluate.settings import Evaluation
    from compressor.run.audit import SweepOptions, find_audited
    from compressor.run.sanitize import sanitize
    from compressor.run.session import choose_device

    display = told.display()
    found = sanitize(
        find_audited(model),
        output.expanduser(),
        sweep=SweepOptions(text=text, tokens=tokens, batch=batch),
        held_out=Evaluation(data=text, windows=windows, length=length),
        max_ppl_ratio=max_ppl_ratio,
        prune=prune,
        device=choose_device(device),
        max_shard_size=max_shard_size,
        stage=display.stage,
        progress=paced(display.unit),
    )
    failure = "still suspect" if found.suspect else ""
    add_cases([Case("sanitize", "verdict", failure=failure, output="\n".join(lines(found)))])
    say(found.to_json(), lines(found), as_json=told.as_json)
    click.get_current_context().exit(1 if found.suspect else 0)


def lines(found: Sanitized) -> list[str]:
    """Before and after for people."""
    before = found.before
    if found.after is None or found.measured is None:
        shown = [f"{before.name}: {before.verdict}; no token is suspect, so nothing was written"]
        return shown + _left(before.findings)
    shown = [f"{found.output}: {before.verdict} before, {found.after.verdict} after"]
    if (pruned := found.pruned) is not None:
        left = f"{pruned.after} of {pruned.before} suspect tokens are left"
        did = ""
        if pruned.nothing:
            did = ": DID NOTHING, and is not in what was written"
        elif not pruned.kept:
            did = f": perplexity {pruned.ratio:.4f} times, so it is not in what was written"
        shown.append(f"  fine-pruning {pruned.share:.0%} of the channels: {left}{did}")
    for name, ids in found.rows.items():
        shown.append(f"  {name}: {len(ids)} rows are the mean of the others")
    shown.append("  token                     collapse           flatness           score")
    for effect in found.effects[:LISTED]:
        was, now = effect.before, effect.after
        shown.append(
            f"  {f'{was.id} {was.text}'[:24]:24}  {was.collapse:.4f} → {now.collapse:.4f}  "
            f"{was.flatness:.4f} → {now.flatness:.4f}  {was.score:5.2f} → {now.score:5.2f}"
            + ("  DID NOTHING: still suspect" if effect.nothing else "")
        )
    shown += _counted(found)
    measured = found.measured
    assert measured.original_perplexity is not None and measured.perplexity_ratio is not None
    ratio = measured.perplexity_ratio
    shown.append(
        f"  perplexity {measured.original_perplexity.value:.4f} → {measured.perplexity.value:.4f}, "
        f"ratio {ratio.value:.4f} ± {ratio.error:.4f}, over {measured.tokens} held-out tokens"
    )
    return shown + _left(found.after.findings)


def _counted(found: Sanitized) -> list[str]:
    more = found.effects[LISTED:]
    if not more:
        return []
    idle = sum(effect.nothing for effect in more)
    return [f"  and {len(more)} more tokens, to {idle} of which the reset did nothing"]


def _left(findings: Sequence[Finding]) -> list[str]:
    """What decides against the model and stays."""
    return [
        f"  left    {f'{finding.tensor}: ' if finding.tensor else ''}{finding.message}"
        for finding in findings
        if finding.level == "suspect"
    ]
