"""compress allocate"""

import json
from collections import Counter
from pathlib import Path

import click

from compressor.cli.echo import echo
from compressor.cli.options import json_option
from compressor.cli.written import WRITTEN, write_file


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--bits-per-weight",
    type=click.FloatRange(min=0, min_open=True),
    help="Mean over all measured weights, scales and zero points included.",
)
@click.option(
    "--megabytes", type=click.FloatRange(min=0, min_open=True), help="Of all measured weights."
)
@click.option(
    "--microseconds",
    type=click.FloatRange(min=0, min_open=True),
    help="For a step of --tokens through all measured weights on --gpu, at its best.",
)
@click.option("--gpu", help="Whose bandwidth and 16-bit operations count: h200, l4, rtx4090, ...")
@click.option("--tokens", default=1, type=click.IntRange(1))
@click.option("--quantizer", help="Rounds in the recipe in place of the measured one: reconstruct.")
@click.option("--output", "-o", type=WRITTEN, help="Write the recipe here; printed if not given.")
@click.option(
    "--picture", type=WRITTEN, help="Write a PNG of what every number of bits would cost."
)
@json_option
def command(
    file: Path,
    bits_per_weight: float | None,
    megabytes: float | None,
    microseconds: float | None,
    gpu: str | None,
    tokens: int,
    quantizer: str | None,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Make a mixed-precision recipe from what `compress measure` wrote.

    Reads no model. Each group of linears gets the form in which the summed error is least within
    one budget: bits, bytes, or the time that a GPU takes at least.

    \b
    compress allocate sensitivity.json --bits-per-weight 4.5
    compress allocate sensitivity.json --megabytes 60 -o mixed.yaml --picture frontier.png
    compress allocate sensitivity.json --microseconds 20 --gpu h200 --quantizer reconstruct
    """
    import yaml

    from compressor.errors import InputError
    from compressor.foreign.calls import foreign
    from compressor.foreign.untrusted import read_file
    from compressor.methods.common.head_plots import curves
    from compressor.plan.recipe import make_recipe
    from compressor.run.allocate import (
        allocate,
        error_of,
        frontier,
        mixed_recipe,
        parse_sensitivity,
        uniform,
        with_quantizer,
    )
    from compressor.run.roofline import GPUS, gpu_of, seconds, timed

    asked = {
        "--bits-per-weight": bits_per_weight,
        "--megabytes": megabytes,
        "--microseconds": microseconds,
    }
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        several = f", not {' and '.join(given)}" if given else ""
        raise InputError(f"one budget is wanted{several}", hint=f"one of {', '.join(asked)}")
    if (microseconds is None) != (gpu is None):
        raise InputError(
            "--microseconds and --gpu go together", hint=f"--gpu one of: {', '.join(GPUS)}"
        )
    found = parse_sensitivity(read_file(file, what="sensitivities"), where=str(file))
    weights = sum(group.weights for group in found.groups)
    if megabytes is not None:
        each = weights / 8e6
        choice = allocate(found, megabytes / each, unit="megabytes", each=each)
    elif microseconds is not None and gpu is not None:
        each = 1e6 * weights / (8 * gpu_of(gpu).bandwidth)
        priced = timed(found, gpu_of(gpu), tokens)
        choice = allocate(priced, microseconds / each, unit="microseconds", each=each)
    else:
        choice = allocate(found, bits_per_weight or 0.0)
    measured = found if quantizer is None else with_quantizer(found, quantizer)
    with foreign(f"{file} is not what compress measure writes"):
        recipe = mixed_recipe(measured, choice)
    make_recipe(recipe)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    spent = found.bits_per_weight(choice)
    chosen = [group.options[i] for group, i in zip(found.groups, choice, strict=True)]
    counts = Counter("as it is" if o.way.label == "in float" else o.way.label for o in chosen)
    error = error_of(found, choice)
    if picture is not None:
        points = {"mixed": frontier(found), **{k: [v] for k, v in uniform(found).items()}}
        drawn = curves(points, title=found.measure, x="bits of a weight", y="error", log=True)
        if drawn is not None:
            write_file(picture, drawn)
    if output is not None:
        write_file(output, text.encode())
    if as_json:
        about = {
            "bits_per_weight": spent,
            "megabytes": spent * weights / 8e6,
            "error": error,
            "groups": dict(counts),
            "frontier": frontier(found),
            "uniform": uniform(found),
            "recipe": recipe,
        }
        echo(json.dumps({"ok": True, **about}, indent=2))
        return
    if output is None:
        echo(text, nl=False)
    shares = ", ".join(f"{count} groups {what}" for what, count in sorted(counts.items()))
    time = "" if gpu is None else f", {1e6 * seconds(spent, weights, gpu_of(gpu), tokens):.1f} µs"
    echo(f"{spent:.3f} bits per weight{time}: {shares}", err=True)
    beside = [
        f"{error / least[1]:.3g} times that of {label} alone ({least[0]:.2f} per weight)"
        for label, least in uniform(found).items()
        if least[1] > 0
    ]
    echo(f"summed error {error:.3g}: {', '.join(beside)}", err=True)
