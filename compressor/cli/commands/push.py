"""compress push"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.display import Display, size
from compressor.cli.echo import echo
from compressor.cli.junit import Case
from compressor.cli.options import FOLDER, Told, add_cases, telling_options
from compressor.errors import several

if TYPE_CHECKING:
    from compressor.report.publish import Changes, Listing
    from compressor.report.settings import Publish

CARD_NAME = "README.md"
FIT = "fit to be published"
"""The case of a test report that says whether what was made may go up."""


@click.command()
@click.argument("checkpoint", type=FOLDER)
@click.argument("repo")
@click.option("--public", is_flag=True, help="A repository that is created is public.")
@click.option("--revision", default="main", help="Branch to commit to.")
@click.option("--message", help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="List what would change there, and send nothing.")
@click.option(
    "--replace-card", is_flag=True, help="Replace also a card that was written by hand there."
)
@click.option("--force", is_flag=True, help="Publish also what did not pass verify or its gate.")
@telling_options
def command(
    checkpoint: Path,
    repo: str,
    public: bool,
    revision: str,
    message: str | None,
    dry_run: bool,
    replace_card: bool,
    force: bool,
    told: Told,
) -> None:
    """Upload a finished checkpoint to the Hub repository REPO (user/name).

    What its manifest names goes up, and the report and card beside it; nothing else in the folder
    does. The same commit deletes what is stale there: other weights that loaders would take, and
    files of an earlier version. What you put there by hand stays, a card of yours too. Files are
    hashed first, and what report.json says of verification and gate is minded; a checkpoint
    without a report is verified here. The same command continues an interrupted upload, and does
    nothing where all has arrived. What the Hub holds afterwards is compared with what was sent.

    Exit code 1: it did not pass and is not published, or something else arrived than was sent.

    \b
    compress push out/smollm2-135m-awq me/smollm2-135m-awq --dry-run
    compress push out/smollm2-135m-awq me/smollm2-135m-awq
    compress push out/smollm2-135m-awq me/smollm2-135m-awq --public --revision v1
    """
    from compressor.errors import CheckError, InputError
    from compressor.report.card import name_repository
    from compressor.report.publish import check_token, list_upload, push
    from compressor.report.settings import REPOSITORY, Publish

    if not REPOSITORY.fullmatch(repo):
        raise InputError(f"{repo!r} is not a Hub repository", hint="user/name")
    display = told.display()
    listing = list_upload(checkpoint)
    to = Publish(repo=repo, private=not public, revision=revision, message=message)
    reasons = find_objections(listing, display)
    if dry_run:
        changes = look(listing, to, display, replace_card=replace_card)
        show(listing, repo, reasons, changes, as_json=told.as_json)
    if reasons and not force:
        refusal = CheckError(
            f"{checkpoint} is not published: {'; '.join(reasons)}",
            hint="repair it, or publish it all the same with --force",
        )
        if not (dry_run and told.as_json):
            raise refusal
        # What it would be is the one object on stdout.
        add_cases([Case("push", FIT, failure=refusal.message)])
        click.get_current_context().exit(1)
    add_cases([Case("push", FIT, output="; ".join(reasons))])
    if dry_run:
        return
    check_token()
    name_repository(checkpoint, repo)
    with display.stage("upload", 0):
        pushed = push(list_upload(checkpoint), to, replace_card=replace_card, progress=display.unit)
    add_cases([Case("push", repo, output=f"{pushed.files} files, commit {pushed.commit}")])
    if told.as_json:
        found = {"ok": True, "repo": repo, "url": pushed.url, "commit": pushed.commit}
        found |= {"files": dict(listing.files), "changes": described(pushed.changes)}
        echo(json.dumps(found, indent=2))
    else:
        echo(f"{pushed.url}: {pushed.files} files, {size(listing.bytes)}, as they lie here")
        show_changes(listing, pushed.changes)
        echo(f"commit {pushed.commit}")


def find_objections(listing: Listing, display: Display) -> list[str]:
    """Why the files should not be published: by their hashes and their report, or by verifying
    them where no report speaks of them."""
    from compressor.report.publish import damaged, recorded_objections

    broken = damaged(listing)
    found = [f"damaged: {', '.join(broken[:4])}"] if broken else []
    recorded = recorded_objections(listing)
    if recorded is not None:
        return found + recorded
    import torch

    from compressor.verify.verify import verify

    with display.stage("verify", 0):
        verdict = verify(listing.folder, device=torch.device("cpu"), progress=display.unit)
    return found if verdict.ok else [*found, *(c.detail for c in verdict.checks if not c.ok)]


def look(listing: Listing, to: Publish, display: Display, *, replace_card: bool) -> Changes | None:
    """What a push would change, or None where the Hub cannot be asked."""
    from compressor.errors import CompressError
    from compressor.report.publish import preview

    try:
        return preview(listing, to, replace_card=replace_card)
    except CompressError as error:
        display.event("note", text=f"what {to.repo} holds is not known: {error.message}")
        return None


def described(changes: Changes) -> dict[str, Any]:
    """Changes as plain data."""
    kinds = ("add", "replace", "delete", "same", "kept")
    return {kind: list(getattr(changes, kind)) for kind in kinds}


def show_changes(listing: Listing, changes: Changes) -> None:
    """What becomes of each file."""
    for what, names in described(changes).items():
        for name in names:
            known = f"  {size(listing.files[name])}" if name in listing.files else ""
            echo(f"  {what:7}  {name}{known}")
    if changes.loaded:
        echo(
            f"note: loaders read {several(changes.loaded, 4)} there, which this checkpoint does "
            "not have: delete them unless they are meant for it"
        )
    if CARD_NAME in changes.kept and CARD_NAME in listing.files:
        echo(f"{CARD_NAME} was written by hand there and stays; --replace-card sends this one")


def show(
    listing: Listing, repo: str, reasons: list[str], changes: Changes | None, *, as_json: bool
) -> None:
    """What would go up, and what would not."""
    if as_json:
        plan: dict[str, Any] = {
            "ok": not reasons,
            "repo": repo,
            "files": dict(listing.files),
            "bytes": listing.bytes,
            "changes": None if changes is None else described(changes),
            "left_out": list(listing.left_out),
            "objections": reasons,
        }
        echo(json.dumps(plan, indent=2))
        return
    if changes is not None:
        show_changes(listing, changes)
    else:
        for name, count in listing.files.items():
            echo(f"  {name}  {size(count)}")
    echo(f"{len(listing.files)} files, {size(listing.bytes)}, would be in {repo}")
    if listing.left_out:
        echo(f"stays here: {', '.join(listing.left_out)}")
