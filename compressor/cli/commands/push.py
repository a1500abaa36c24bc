"""compress push"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.display import Display, LogFormat, size
from compressor.cli.echo import echo
from compressor.cli.junit import Case
from compressor.cli.options import FOLDER, add_cases, json_option, junit_option, log_option

if TYPE_CHECKING:
    from compressor.publish import Listing

FIT = "fit to be published"
"""The case of a test report that says whether what was made may go up."""


@click.command()
@click.argument("checkpoint", type=FOLDER)
@click.argument("repo")
@click.option("--public", is_flag=True, help="A repository that is created is public.")
@click.option("--revision", default="main", show_default=True, help="Branch to commit to.")
@click.option("--message", help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="List what would go up, and send nothing.")
@click.option("--force", is_flag=True, help="Publish also what did not pass verify or its gate.")
@log_option
@junit_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    checkpoint: Path,
    repo: str,
    public: bool,
    revision: str,
    message: str | None,
    dry_run: bool,
    force: bool,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Upload a finished checkpoint to the Hub repository REPO (user/name).

    What its manifest names goes up, and the report and card beside it; nothing else in the folder
    does. Files are hashed first, and what report.json says of verification and gate is minded; a
    checkpoint without a report is verified here. The same command continues an interrupted upload.
    What the Hub holds afterwards is compared with what was sent.

    Exit code 1: it did not pass and is not published, or something else arrived than was sent.

    \b
    compress push out/smollm2-135m-awq me/smollm2-135m-awq --dry-run
    compress push out/smollm2-135m-awq me/smollm2-135m-awq
    """
    from compressor.card import name_repository
    from compressor.errors import CheckError, InputError
    from compressor.publish import check_token, list_upload, push
    from compressor.report_settings import REPOSITORY, Publish

    if not REPOSITORY.fullmatch(repo):
        raise InputError(f"{repo!r} is not a Hub repository", hint="user/name")
    display = Display(log_format=log_format)
    listing = list_upload(checkpoint)
    reasons = find_objections(listing, display)
    if dry_run:
        show(listing, repo, reasons, as_json=as_json)
    if reasons and not force:
        refusal = CheckError(
            f"{checkpoint} is not published: {'; '.join(reasons)}",
            hint="repair it, or publish it all the same with --force",
        )
        if not (dry_run and as_json):
            raise refusal
        # What it would be is the one object on stdout.
        add_cases([Case("push", FIT, failure=refusal.message)])
        context.exit(1)
    add_cases([Case("push", FIT, output="; ".join(reasons))])
    if dry_run:
        return
    check_token()
    name_repository(checkpoint, repo)
    to = Publish(repo=repo, private=not public, revision=revision, message=message)
    with display.stage("upload", len(listing.files)):
        pushed = push(list_upload(checkpoint), to, progress=display.unit)
    add_cases([Case("push", repo, output=f"{pushed.files} files, commit {pushed.commit}")])
    if as_json:
        found = {"ok": True, "repo": repo, "url": pushed.url, "commit": pushed.commit}
        echo(json.dumps({**found, "files": dict(listing.files)}, indent=2))
    else:
        echo(f"{pushed.url}: {pushed.files} files, {size(listing.bytes)}, as sent")
        echo(f"commit {pushed.commit}")


def find_objections(listing: Listing, display: Display) -> list[str]:
    """Why the files should not be published: by their hashes and their report, or by verifying
    them where no report speaks of them."""
    from compressor.publish import damaged, recorded_objections

    broken = damaged(listing)
    found = [f"damaged: {', '.join(broken[:4])}"] if broken else []
    recorded = recorded_objections(listing)
    if recorded is not None:
        return found + recorded
    import torch

    from compressor.verify import verify

    with display.stage("verify", 0):
        verdict = verify(listing.folder, device=torch.device("cpu"), progress=display.unit)
    return found if verdict.ok else [*found, *(c.detail for c in verdict.checks if not c.ok)]


def show(listing: Listing, repo: str, reasons: list[str], *, as_json: bool) -> None:
    """What would go up, and what would not."""
    if as_json:
        plan: dict[str, Any] = {
            "ok": not reasons,
            "repo": repo,
            "files": dict(listing.files),
            "bytes": listing.bytes,
            "left_out": list(listing.left_out),
            "objections": reasons,
        }
        echo(json.dumps(plan, indent=2))
        return
    width = max(map(len, listing.files))
    for name, count in listing.files.items():
        echo(f"  {name:{width}}  {size(count)}")
    echo(f"{len(listing.files)} files, {size(listing.bytes)}, would go to {repo}")
    if listing.left_out:
        echo(f"stays here: {', '.join(listing.left_out)}")
