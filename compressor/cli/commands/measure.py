"""compress measure"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.display import Display, LogFormat
from compressor.cli.echo import echo
from compressor.cli.options import MODEL, device_option, json_option, log_option
from compressor.cli.written import WRITTEN, write_file
from compressor.errors import several

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compressor.checkpoint.source import Source
    from compressor.run.allocate import Way


@click.command()
@click.argument("subject", type=MODEL, metavar="RECIPE|MODEL")
@click.option(
    "--bits",
    multiple=True,
    type=click.IntRange(2, 8),
    default=(3, 4, 8),
    help="Bits to try; repeat the option.",
)
@click.option(
    "--form",
    "forms",
    multiple=True,
    type=click.Choice(["fp8", "nvfp4", "mxfp4", "mxfp8"]),
    help="Other forms to try beside integers; repeat the option.",
)
@click.option(
    "--error",
    "kind",
    type=click.Choice(["change", "kl"]),
    default="change",
    help="change: of the hidden states after the block; kl: what that change costs the model's "
    "predictions, by a backward pass with the whole model in memory.",
)
@click.option(
    "--group-size",
    "groups",
    multiple=True,
    type=click.IntRange(1),
    help="Of integers, in place of the recipe's; repeat the option to try several.",
)
@click.option("--samples", type=click.IntRange(1), help="Rows of calibration tokens.")
@click.option("--length", type=click.IntRange(8), help="Tokens of each row.")
@click.option("--batch", default=4, type=click.IntRange(1))
@click.option(
    "--attention",
    type=click.Choice(["moba"]),
    help="Of a MODEL: what such attention would cost it by layer, in place of bits.",
)
@click.option(
    "--blocks",
    multiple=True,
    type=click.IntRange(8),
    default=(32, 64, 128, 256, 512),
    help="Block sizes to try with --attention; repeat the option.",
)
@device_option
@click.option(
    "--output",
    "-o",
    "out",
    type=WRITTEN,
    default=Path("sensitivity.json"),
    help="The file to write.",
)
@log_option
@json_option
def command(
    subject: str,
    bits: tuple[int, ...],
    forms: tuple[str, ...],
    kind: str,
    groups: tuple[int, ...],
    samples: int | None,
    length: int | None,
    batch: int,
    attention: str | None,
    blocks: tuple[int, ...],
    device: str,
    out: Path,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Measure how much each layer costs at each number of bits; write it as a file.

    Of a RECIPE (a .yaml file) the quantizer is tried with each number of bits, after its
    transforms; of a MODEL, rounding to nearest; with --form so are floats in its place. Nothing is
    compressed. `compress allocate` makes a recipe of the file.

    \b
    compress measure recipes/smollm2-awq.yaml --bits 3 --bits 4 --bits 8
    compress measure ./my-model --group-size 64 -o sensitivity.json
    compress measure ./my-model --bits 3 --bits 4 --form nvfp4 --form fp8 --error kl
    compress measure gptq.yaml --bits 3 --bits 4 --group-size 32 --group-size 64 --error kl
    compress allocate sensitivity.json --bits-per-weight 4.5 > mixed.yaml
    compress measure MODEL --attention moba --length 4096 -o moba.json
    """
    from compressor.checkpoint.find import locate
    from compressor.plan.recipe import make_recipe
    from compressor.plan.recipe_file import read_recipe
    from compressor.plan.unit_plan import DTYPES
    from compressor.run.activation_store import open_activations
    from compressor.run.sensitivity import measure_sensitivity, plans_of_bits
    from compressor.run.session import choose_device
    from compressor.run.tokens import calibration_tokens
    from compressor.runner.tokenizer import load_tokenizer

    where = choose_device(device)
    if subject.endswith((".yaml", ".yml")):
        data: dict[str, Any] = read_recipe(Path(subject))
    else:
        data = {"model": subject, "output": "out/mixed", "passes": [{"rtn": {}}]}
    calibration = data.setdefault("calibration", {})
    given = {"samples": samples, "length": length}
    if isinstance(calibration, dict):
        calibration.update({key: value for key, value in given.items() if value is not None})
    recipe = make_recipe(data)
    source = locate(
        recipe.model, fetch=True, dtype=DTYPES.get(recipe.dtype), chosen=recipe.map
    ).source
    if attention is not None:
        tokenizer = load_tokenizer(source.checkpoint.folder)
        tokens = calibration_tokens(tokenizer, recipe.calibration, seed=recipe.seed)
        _measure_blocks(source, tokens.ids, blocks, where, batch, out, log_format, as_json)
        return
    if not subject.endswith((".yaml", ".yml")):
        data["passes"] = [{"rtn": {"group_size": _group_size(source.layout.linears)}}]
    plans_of_bits(data, source, bits, forms, groups)
    tokenizer = load_tokenizer(source.checkpoint.folder)
    tokens = calibration_tokens(tokenizer, recipe.calibration, seed=recipe.seed)
    display = Display(log_format=log_format)
    with display.stage("measure", len(source.layout.blocks)):
        found = measure_sensitivity(
            data,
            source,
            bits,
            tokens.ids,
            device=where,
            batch=batch,
            forms=forms,
            groups=groups,
            weighted=kind == "kl",
            activations=open_activations(recipe.activation_store, where),
            progress=display.unit,
        )
    write_file(out, (found.model_dump_json(indent=1) + "\n").encode())
    if as_json:
        echo(json.dumps({"ok": True, "file": str(out), "groups": len(found.groups)}))
        return
    tried = [_short(option.way) for option in found.groups[0].options[:-1]]
    echo(f"{'error at bits':>12} " + " ".join(f"{b:>9}" for b in tried) + "  the costliest")
    for group in sorted(found.groups, key=lambda g: -g.options[0].error)[:10]:
        row = " ".join(f"{option.error:9.2e}" for option in group.options[:-1])
        echo(f"{'':>13} {row}  {several(group.linears)}")
    echo(f"written to {out}: {len(found.groups)} groups")


def _short(way: Way) -> str:
    """`4`, `4 g32` where several group sizes are tried, `nvfp4`."""
    size = "" if way.group_size is None else f" g{way.group_size}"
    return way.form or f"{way.bits}{size}"


def _measure_blocks(
    source: Source, ids: Tensor, blocks: Sequence[int], where: torch.device, batch: int, out: Path,
    log_format: LogFormat, as_json: bool,
) -> None:  # fmt: skip
    """What blocks by mean keys would cost, as a table, a file and a plot."""

    from compressor.attention.moba_fit import fit_blocks, to_json
    from compressor.errors import InputError
    from compressor.methods.common.head_plots import curves
    from compressor.runner.source_model import SourceModel

    sizes = sorted({size for size in blocks if 2 * size <= ids.shape[1]})
    if not sizes:
        raise InputError(
            f"rows of {ids.shape[1]} tokens hold no two blocks of {min(blocks)}",
            hint="--length 4096, or smaller --blocks",
        )
    dtype = source.checkpoint.running_dtype(where)
    model = SourceModel(source, device=where, dtype=dtype)
    display = Display(log_format=log_format)
    with display.stage("measure", len(source.layout.blocks)):
        fits = fit_blocks(model, ids, sizes, batch=batch, progress=display.unit)
    about = {"rows": ids.shape[0], "length": ids.shape[1]}
    found = to_json(fits, **about)
    write_file(out, (json.dumps(found, indent=1) + "\n").encode())
    lines = {
        f"layer {fit.layer}": [(float(k + 1), share) for k, share in enumerate(fit.kept)]
        for fit in fits
        if fit.block == sizes[0]
    }
    plot = curves(
        lines,
        title=f"Attention in the best blocks of {sizes[0]}",
        x="blocks",
        y="share of attention",
    )
    if plot is not None:
        write_file(out.with_suffix(".png"), plot)
    if as_json:
        echo(json.dumps({"ok": True, "file": str(out), **found}))
        return
    echo(f"{'layer':>5} {'block':>5}  {'kept by 2':>9} {'4':>6} {'8':>6} {'16':>6}  {'Δμ':>6} "
         f"{'SNR':>6}  95 % of attention in")  # fmt: skip
    for fit in fits:
        kept = [f"{fit.kept[min(k, len(fit.kept)) - 1]:6.1%}" for k in (2, 4, 8, 16)]
        full = ": stays full" if fit.stays_full else ""
        shares = f"{kept[0]:>9} {' '.join(kept[1:])}  {fit.delta_mu:6.3f} {fit.snr:6.2f}"
        blocks_needed = f"{fit.enough} of {len(fit.kept)} blocks{full}"
        echo(f"{fit.layer:>5} {fit.block:>5}  {shares}  {blocks_needed}")
    echo(f"written to {out}")


def _group_size(linears: Any) -> int:
    """The largest usual group that divides the inputs of every linear."""
    left = ("router", "lm_head")
    sizes = {x.in_features for x in linears if x.role not in left and not x.beside}
    return next((g for g in (128, 64, 32, 16) if all(n % g == 0 for n in sizes)), 1)
