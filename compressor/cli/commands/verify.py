"""compress verify"""

from contextlib import nullcontext
from pathlib import Path

import click

from compressor.cli.echo import say
from compressor.cli.importing import uncollected
from compressor.cli.junit import verify_cases
from compressor.cli.options import (
    Told,
    add_cases,
    checkpoint_options,
    device_option,
    telling_options,
)
from compressor.cli.several import gpus_option, joined_ranks, start_ranks
from compressor.ranks.place import place_of
from compressor.runner.driver import start_driver
from compressor.verify.apart import beside_gpu
from compressor.verify.findings import VerifyReport


@click.command()
@checkpoint_options
@click.option("--seed", default=0, help="Which tiles of the layers are sampled.")
@device_option
@gpus_option
@telling_options
def command(
    checkpoint: Path,
    against: str | None,
    base: str | None,
    seed: int,
    device: str,
    gpus: str | None,
    told: Told,
) -> None:
    """Reopen a checkpoint's files and prove them.

    Hashes, headers, every key of config.json as it was written, every tensor the model needs, no
    NaN; codes and scales by a second reader; each packed layer's product through its kernel
    against float64 (on a CPU one seeded tile of each in Triton's interpreter). By itself that
    proves that the files are whole and what was written, not that what was written is the model:
    with --against, every tensor and every key and file that decides the function is held against
    the original, and each block's output on held-out text. What cannot be compared fails.

    Exit code 1: the checkpoint is damaged, or not the original's, and what differs is named. 2:
    there is no checkpoint to read.

    \b
    compress verify out/smollm2-135m-awq
    compress verify out/smollm2-135m-awq --against ~/.cache/compressor/smollm2-135m
    compress verify out/vicuna-delta --base ./llama2-7b --against ./vicuna --junit verify.xml
    """
    start_ranks(gpus)
    start_driver(device)
    beside = beside_gpu(device) if against and place_of() is None else nullcontext()
    apart = click.get_current_context().with_resource(beside)
    with uncollected():
        from compressor.checkpoint.find import locate
        from compressor.run.alike import computing, require_alike
        from compressor.verify.verify import verify

    display = told.display()
    with joined_ranks(device) as (where, ranks), display.stage("verify", 0):
        original = locate(against, fetch=True).source if against else None
        if ranks.world > 1:  # what a GPU computes with takes a while to ask
            require_alike(ranks, computing(where), *([original] if original else []))
        report = verify(
            checkpoint,
            base=base,
            against=original,
            device=where,
            seed=seed,
            progress=display.unit,
            ranks=ranks,
            apart=apart if where.type == "cuda" else None,
        )
    add_cases(verify_cases(report))
    say(report.to_json(), lines(report), as_json=told.as_json)
    click.get_current_context().exit(0 if report.ok else 1)


def lines(report: VerifyReport) -> list[str]:
    """A verdict for people."""
    width = max((len(c.name) for c in report.checks), default=0)
    shown = [
        f"{'ok    ' if c.ok else 'FAILED'}  {c.name:<{width}}  {c.detail}" for c in report.checks
    ]
    shown.append(f"{report.folder}: {'verified' if report.ok else 'DAMAGED'}")
    if report.ok:
        shown.append(f"proved: {report.proves}")
    return shown
