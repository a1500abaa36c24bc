"""compress compare"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.echo import say
from compressor.cli.options import MODEL, Told, device_option, telling_options
from compressor.cli.written import WRITTEN, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.checkpoint.find import Located

SHOWN = 8


@click.command()
@click.argument("checkpoints", nargs=-1, type=MODEL, metavar="A B [C ...]")
@click.option("--against", type=MODEL, help="The original: folder, GGUF file or Hub id.")
@click.option("--weights-only", is_flag=True, help="Look at tensors alone, without a forward pass.")
@click.option("--text", default="bundled", help="bundled, a file, a folder or a Hub id.")
@click.option("--windows", default=16, type=click.IntRange(1))
@click.option("--length", default=512, type=click.IntRange(8))
@click.option("--batch", default=4, type=click.IntRange(1))
@click.option("--html", "page", type=WRITTEN, help="Also write what was found as a page.")
@device_option
@telling_options
def command(
    checkpoints: tuple[str, ...],
    against: str | None,
    weights_only: bool,
    text: str,
    windows: int,
    length: int,
    batch: int,
    page: Path | None,
    device: str,
    told: Told,
) -> None:
    """Show checkpoints side by side: sizes, schemes, perplexity, KL, errors by layer, kernels.

    Each is a folder, a GGUF file or a Hub id. They are compared with the one that --against
    names, or with the first that is not quantized; without one, what needs a reference is left
    out. All are evaluated on the same tokens, block by block, with one unit in memory. On a GPU
    the linears of a block are timed through this project's kernels.

    \b
    compress compare ./smollm2-135m out/smollm2-w4a16 out/smollm2-fp8
    compress compare out/awq out/gptq --against ./smollm2-135m --html compared.html
    compress compare out/awq out/gptq --weights-only --json > compared.json
    """
    from compressor.checkpoint.find import locate
    from compressor.errors import InputError
    from compressor.report.comparison import page_of
    from compressor.run.compare import choose_reference, compare
    from compressor.run.session import choose_device

    named = [*([against] if against else []), *checkpoints]
    if len(named) < 2:
        raise click.UsageError("name two checkpoints or more, or one and --against")
    where, display = choose_device(device), told.display()
    located = [locate(name, fetch=True) for name in named]
    if len({each.source.checkpoint.folder.resolve() for each in located}) < len(located):
        raise InputError("one checkpoint is named twice", hint="each beside others")
    reference = 0 if against else choose_reference(located)
    tokens = None if weights_only else _tokens(located[reference or 0], text, windows, length)
    with display.stage("compare", 0):
        sides = compare(
            located,
            reference=reference,
            tokens=tokens,
            device=where,
            batch=batch,
            progress=display.unit,
        )
    found = [side.to_json() for side in sides]
    over = "Nothing was evaluated." if tokens is None else f"Over {windows} x {length} tokens."
    if page is not None:
        write_file(page, page_of(found, text=over).encode())
    name = None if reference is None else sides[reference].name
    about = {"ok": True, "reference": name, "windows": windows, "length": length, "text": text}
    say({**about, "checkpoints": found}, lines(found), as_json=told.as_json)
    if reference is None and not told.as_json:
        hint = "none of them is unquantized: --against ORIGINAL adds KL and errors"
        display.event("note", text=hint)


def _tokens(located: Located, text: str, windows: int, length: int) -> Tensor:
    """Held-out rows, by the tokenizer of one of them."""
    from compressor.evaluate.settings import Evaluation
    from compressor.run.tokens import evaluation_tokens
    from compressor.runner.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(located.source.checkpoint.folder)
    wanted = Evaluation(data=text, windows=windows, length=length)
    return evaluation_tokens(tokenizer, wanted, calibration=None).ids


def lines(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """A comparison for people."""
    from compressor.report.comparison import figures, kernel_roles, kernel_rows
    from compressor.report.text import relative_error

    shown = _table(
        ["", *figures(sides[0])],
        [
            [
                f"{side['name']}{' (reference)' if side['reference'] else ''}",
                *figures(side).values(),
            ]
            for side in sides
        ],
    )
    for side in sides:
        shown += ["", side["name"]]
        shown += [f"  {count:>5} linears {scheme}" for scheme, count in side["schemes"].items()]
        worst = sorted(side["layers"].items(), key=lambda row: -row[1])[:3]
        if worst:
            named = ", ".join(f"{name} {relative_error(error)}" for name, error in worst)
            shown.append(f"  largest errors of weights: {named}")
        more = f" and {len(side['notes']) - SHOWN} more" if len(side["notes"]) > SHOWN else ""
        if side["notes"]:
            shown.append(f"  beyond rounding{more}:")
        shown += [f"    {note}" for note in side["notes"][:SHOWN]]
    if rows := kernel_rows(sides):
        shown += ["", "microseconds of one linear of each role, inputs rounded too"]
        header = ["", "tokens", *kernel_roles(sides), "all"]
        shown += _table(header, [[name, tokens, *times] for name, tokens, times in rows])
    return shown


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
