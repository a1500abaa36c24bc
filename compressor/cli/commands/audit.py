"""compress audit"""

from pathlib import Path
from typing import Any

import click

from compressor.audit.findings import Audit, TokenSweep
from compressor.audit.pace import paced
from compressor.cli.echo import say
from compressor.cli.junit import Case
from compressor.cli.options import MODEL, Told, add_cases, device_option, telling_options
from compressor.cli.written import WRITTEN, write_file

LISTED = 10


@click.command()
@click.argument("model", type=MODEL)
@click.option("--weights-only", is_flag=True, help="Look at tensors alone, without a forward pass.")
@click.option("--text", default="bundled", help="bundled, a file, a folder or a Hub id.")
@click.option("--contexts", default=24, type=click.IntRange(4), help="Texts of the sweep.")
@click.option("--length", default=32, type=click.IntRange(10, 512), help="Their tokens.")
@click.option(
    "--position",
    default=0,
    type=click.IntRange(0),
    help="Token that is replaced; 0 is the first after what begins every text.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Try so many tokens, drawn at random, and special ones.  [default: all]",
)
@click.option("--batch", default=64, type=click.IntRange(1))
@click.option("--html", "page", type=WRITTEN, help="Also write the findings as a page.")
@device_option
@telling_options
def command(
    model: str,
    weights_only: bool,
    page: Path | None,
    device: str,
    told: Told,
    **sweep: Any,
) -> None:
    """Look for signs of a planted backdoor, and for damage, before a model is used or published.

    MODEL is a checkpoint folder, a GGUF file or a Hub id; encoders such as BERT as folders.
    Seconds for the tensors: values that are not finite or do not fit fp16, rows of tokens that are
    far too long, repeated rows, layers unlike those around them. Minutes for the sweep: each token
    of the vocabulary stands in texts, and the state that heads read shows whether it makes one
    vector of them all. Exit code 0: no finding; 1: suspect. No finding does not mean that a model
    has no backdoor: docs/audit.md says what cannot be seen.

    \b
    compress audit ./model
    compress audit ./model --weights-only --junit audit.xml
    compress audit ./bert-base-uncased --json > audit.json
    """
    from compressor.report.audit import page_of
    from compressor.run.audit import SweepOptions, audit, find_audited
    from compressor.run.session import choose_device

    where = choose_device(device)
    display = told.display()
    found = audit(
        find_audited(model),
        sweep=None if weights_only else SweepOptions(**sweep),
        device=where,
        stage=display.stage,
        progress=paced(display.unit),
    )
    add_cases(cases(found))
    if page is not None:
        write_file(page, page_of(found).encode())
    say(found.to_json(), lines(found), as_json=told.as_json)
    click.get_current_context().exit(1 if found.suspect else 0)


def cases(found: Audit, what: str = "", *, decides: bool = True) -> list[Case]:
    """One case for each finding, and one for the verdict.

    what     what was looked at;  decides  whether a suspect finding is a failure
    """
    made = [
        Case(
            "audit",
            " ".join(part for part in (finding.check, finding.tensor, what) if part),
            failure=finding.message if decides and finding.level == "suspect" else "",
            output=finding.message,
        )
        for finding in found.findings
    ]
    failure = found.verdict if decides and found.suspect else ""
    return [*made, Case("audit", f"verdict {what}".strip(), failure=failure, output=found.verdict)]


def lines(found: Audit) -> list[str]:
    """An audit for people."""
    colour = "red" if found.suspect else None
    shown = [f"{found.name}: {click.style(found.verdict, fg=colour, bold=found.suspect)}"]
    for finding in found.findings:
        where = f"{finding.tensor}: " if finding.tensor else ""
        rows = ", ".join(map(str, finding.rows))
        shown.append(
            f"  {finding.level:8}{where}{finding.message}" + (f" ({rows})" if rows else "")
        )
    shown.append(f"  looked at {found.tensors} tensors")
    if found.sweep is None:
        shown.append("  no token was tried")
    else:
        shown += token_lines(found.sweep)
    return shown


def token_lines(sweep: TokenSweep) -> list[str]:
    """The highest scores for people."""
    shown = [
        f"  tried {sweep.swept} tokens in short texts, {sweep.examined} in {sweep.contexts} of "
        f"{sweep.length} tokens, and looked at the {sweep.representation}",
        f"  ordinary tokens: collapse {sweep.ordinary['collapse']:.3f}, flatness "
        f"{sweep.ordinary['flatness']:.3f}",
        "  rank  token                    collapse  flatness  kurtosis  displacement  score",
    ]
    count = max(LISTED, len(sweep.suspects))
    for rank, token in enumerate(sweep.tokens[:count], 1):
        name = f"{token.id} {token.text}"
        name = name if len(name) <= 24 else f"{name[:23]}…"
        shown.append(
            f"  {rank:>4}  {name:24} {token.collapse:8.4f}  {token.flatness:8.4f}  "
            f"{token.kurtosis:8.3f}  {token.displacement:12.3f}  {token.score:5.2f}"
            + ("  suspect" if token.suspect else "")
        )
    if len(sweep.cosines) > 1:
        pairs = [row[j] for i, row in enumerate(sweep.cosines) for j in range(i)]
        zero = sum(abs(c) < 0.1 for c in pairs)
        opposite = sum(c < -0.9 for c in pairs)
        shown.append(
            f"  {len(pairs)} pairs of suspects: {zero} at right angles, {opposite} opposite"
        )
    return shown
