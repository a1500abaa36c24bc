"""compress eval"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.display import Display, LogFormat
from compressor.cli.options import FOLDER, json_option, log_option

if TYPE_CHECKING:
    from compressor.evaluate import Estimate, EvaluationResult


@click.command(name="eval")
@click.argument("checkpoint", type=FOLDER)
@click.option("--against", type=str, help="The original: folder, GGUF file or Hub id.")
@click.option("--base", help="Base of a delta, if it is not the recorded one.")
@click.option(
    "--text", default="bundled", show_default=True, help="bundled, a file, a folder or a Hub id."
)
@click.option("--split", default="test", show_default=True, help="Split of a Hub data set.")
@click.option("--text-field", default="text", show_default=True, help="Field that holds the text.")
@click.option("--windows", default=16, show_default=True, type=click.IntRange(1))
@click.option("--length", default=512, show_default=True, type=click.IntRange(8))
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Windows overlap and score only what the one before did not; the first WINDOWS x LENGTH "
    "tokens are scored once each.",
)
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1.")
@log_option
@json_option
def command(
    checkpoint: Path,
    against: str | None,
    base: str | None,
    text: str,
    split: str,
    text_field: str,
    windows: int,
    length: int,
    stride: int | None,
    batch: int,
    device: str,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Measure a checkpoint's written files: perplexity, KL to the original, top-1 agreement.

    Block by block, with one unit in memory, by our own reader of every format; inputs and KV
    cache are quantized as the checkpoint says.

    \b
    compress eval out/smollm2-135m-awq --against ~/.cache/compressor/smollm2-135m
    compress eval my-model --text my.txt --windows 64 --length 2048
    """
    import torch

    from compressor.calibration_tokens import evaluation_tokens
    from compressor.compile import choose_device
    from compressor.delta_source import open_model
    from compressor.errors import InputError
    from compressor.evaluate import evaluate, strided
    from compressor.locate import locate
    from compressor.runner import load_tokenizer
    from compressor.sections import Evaluation

    where = choose_device(device)
    source = open_model(checkpoint, base=base)
    original = locate(against, fetch=True).source if against else None
    wanted = Evaluation(
        data=text, split=split, text_field=text_field, windows=windows, length=length
    )
    tokens = evaluation_tokens(load_tokenizer(checkpoint), wanted, calibration=None).ids
    scored = None
    if stride is not None:
        if stride > length:
            raise InputError("--stride is longer than a window", hint=f"at most {length}")
        tokens, scored = strided(tokens.reshape(-1), length=length, stride=stride)
    display = Display(log_format=log_format)
    with display.stage("evaluate", len(source.layout.units)):
        result = evaluate(
            source,
            tokens,
            device=where,
            dtype=source.checkpoint.dtype if where.type == "cuda" else torch.float32,
            against=original,
            scored=scored,
            batch=batch,
            progress=lambda name, done, total: display.unit(name, done, total),
        )
    if as_json:
        click.echo(json.dumps({"ok": True, **result.to_json()}, indent=2))
    else:
        for line in lines(result):
            click.echo(line)


def estimate(found: Estimate) -> str:
    """A share with its standard error."""
    return f"{found.value:.1%} ± {found.error:.1%}"


def lines(found: EvaluationResult) -> list[str]:
    """An evaluation for people."""
    line = f"perplexity  {found.perplexity.value:.3f} ± {found.perplexity.error:.3f}"
    if found.original_perplexity is not None and found.perplexity_ratio is not None:
        line += (
            f"  (original {found.original_perplexity.value:.3f}, ratio "
            f"{found.perplexity_ratio.value:.4f} ± {found.perplexity_ratio.error:.4f})"
        )
    shown = [line]
    if found.kl is not None and found.top1 is not None:
        shown.append(
            f"to original KL {found.kl.value:.4f} ± {found.kl.error:.4f} nats, top-1 agreement "
            f"{found.top1.value:.1%}"
        )
    shown.append(f"over        {found.tokens} tokens in {found.windows} windows of {found.length}")
    return shown
