"""compress quantize"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from compressor.cli.echo import echo
from compressor.cli.importing import uncollected
from compressor.cli.options import (
    MODEL,
    Told,
    again_option,
    device_options,
    runtime_option,
    telling_options,
)
from compressor.cli.several import gpus_option, start_ranks
from compressor.cli.written import write_file
from compressor.runner.driver import start_driver

if TYPE_CHECKING:
    from compressor.checkpoint.source import Source
    from compressor.plan.choose import Choice, Quality, Wish

SCHEMES = (
    *("w4a16", "w8a8", "fp8", "fp8-block", "nvfp4", "nvfp4-fp8", "mxfp4", "mxfp8"),
    *("w8a16", "w4a8", "w4afp8"),
)
ALSO_CALLED = {
    **dict.fromkeys(("int4", "4bit", "w4", "awq", "gptq", "autoround", "q4", "q4_k_m"), "w4a16"),
    **dict.fromkeys(("int8", "8bit", "smoothquant"), "w8a8"),
    **dict.fromkeys(("w8", "q8", "q8_0"), "w8a16"),
    **dict.fromkeys(("fp4", "w4a4"), "nvfp4"),
    **dict.fromkeys(("qoq", "qserve"), "w4a8"),
}
"""What others call a scheme, or a method that mostly makes it."""


class Scheme(click.Choice):  # type: ignore[type-arg]  # no generic before click 8.2
    """A scheme by name; what others call it leads to it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).lower() in SCHEMES:
            return str(value).lower()
        plain = str(value).lower().replace("-", "").replace(" ", "")
        near = ALSO_CALLED.get(plain) or difflib.get_close_matches(plain, SCHEMES, 1)
        hint = f"did you mean {near if isinstance(near, str) else near[0]!r}? " if near else ""
        self.fail(f"{value!r} is not a scheme; {hint}there are {', '.join(SCHEMES)}", param, ctx)


SCHEME = Scheme(SCHEMES)


quality_option = click.option(
    "--quality",
    type=click.Choice(["fast", "good", "best"]),
    default="good",
    help="fast: rounding without data; good: calibrated; best: refined with gradients, where "
    "the scheme has that.",
)


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--output", "-o", type=MODEL, help="Folder to write; MODEL's name and the scheme if not given."
)
@click.option("--scheme", type=SCHEME, help="Weights and inputs.")
@click.option(
    "--bits-per-weight",
    type=click.FloatRange(min=0, min_open=True),
    help="Mean over all quantized weights, scales and zero points included: what each layer costs "
    "at 2 to 8 bits is measured first. In place of --scheme.",
)
@quality_option
@runtime_option
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a key of the recipe: calibration.samples=64. Repeatable.",
)
@device_options
@gpus_option
@again_option
@click.option("--recipe-only", is_flag=True, help="Stop once the recipe is printed and saved.")
@telling_options
def command(
    model: str,
    output: str | None,
    scheme: str | None,
    bits_per_weight: float | None,
    quality: str,
    runtime: str | None,
    overrides: tuple[str, ...],
    device: str,
    device_memory: int | None,
    gpus: str | None,
    again: bool,
    recipe_only: bool,
    told: Told,
) -> None:
    """Quantize a model without writing a recipe: one is chosen, printed, saved and run.

    MODEL is a folder, a GGUF file or a Hub id. The choice follows from its headers, the GPU and
    what the runtime of --for loads; reasons stand as comments in OUTPUT.yaml, beside the output.
    `compress run OUTPUT.yaml` does the same again, after edits something else.

    \b
    compress quantize meta-llama/Llama-3.1-8B --scheme w4a16 --for vllm
    compress quantize ./qwen3-8b -o out/qwen3-fp8 --scheme fp8 --quality fast
    compress quantize ./my-model --scheme nvfp4 --for 'vllm, gpu: b200' --recipe-only
    compress quantize ./my-model --bits-per-weight 4.5 --for vllm
    """
    if (scheme is None) == (bits_per_weight is None):
        if model.endswith((".yaml", ".yml")):
            raise click.UsageError(f"{model} is a recipe: compress run {model}")
        schemes = ", ".join(SCHEMES[1:])
        raise click.UsageError(
            f"say what to make: --scheme w4a16 (or {schemes}), or --bits-per-weight 4.5"
        )
    target = output_folder(model, output, scheme or f"{bits_per_weight:g}-bits")
    if scheme is not None and not recipe_only:
        start_ranks(gpus)
    start_driver(device)
    with uncollected():
        from compressor.checkpoint.workspace import refusal
        from compressor.plan.choose import choose
        from compressor.plan.recipe import make_recipe

        wish, source = read_headers(
            model,
            str(target),
            scheme=scheme,
            quality=cast("Quality", quality),
            runtime=runtime,
            overrides=overrides,
            device=device,
        )
        where, own = target.expanduser(), source.checkpoint.folder
        if (refused := refusal(where, models=[own])) is not None:
            raise refused
        if bits_per_weight is None:
            choice = choose(wish, source)
        else:
            choice = mixed(wish, bits_per_weight, source, target, device=device, told=told)
            if not recipe_only:
                start_ranks(gpus)  # which read what was measured
    file = _save(choice, target)
    if not told.as_json:
        echo(choice.text(), nl=False)
    told.display().event("recipe", text=f"saved as {file}")
    if recipe_only:
        if told.as_json:
            about = {"file": str(file), "reasons": list(choice.reasons), "recipe": choice.data}
            echo(json.dumps({"ok": True, **about}, indent=2))
        return
    from compressor.cli.commands.run import run_recipe

    recipe = make_recipe(choice.data)
    run_recipe(recipe, device=device, device_memory=device_memory, again=again, told=told)


def output_folder(model: str, output: str | None, scheme: str) -> Path:
    """The folder to write, by the model's name unless one is given."""
    from compressor.checkpoint.find import name_folder

    if output is None:
        path = Path(model).expanduser()
        found = Path(name_folder(path)["name"] if path.exists() else model.partition("@")[0])
        name = f"{found.name.removesuffix('.gguf')}-{scheme}"
        # Who stands in the model's folder gets it beside that.
        inside = path.is_dir() and Path.cwd().is_relative_to(path.resolve())
        return path.resolve().with_name(name) if inside else Path(name)
    target = Path(output)
    if target.name in ("", ".."):
        raise click.UsageError(f"--output {output!r} names no folder")
    return target


def read_headers(
    model: str, output: str, *, scheme: str | None, device: str, **asked: Any
) -> tuple[Wish, Source]:
    """What is asked for, and the model of which headers are read."""
    import torch

    from compressor.checkpoint.find import locate
    from compressor.plan.choose import Wish
    from compressor.run.mixed import SCHEME
    from compressor.run.session import choose_device

    there = torch.cuda.is_available()
    gpu = device.startswith("cuda") or (device == "auto" and there)
    capability = None
    if gpu and there:
        major, minor = torch.cuda.get_device_capability(choose_device(device))
        capability = 10 * major + minor
    wish = Wish(model, output, scheme or SCHEME, gpu=gpu, capability=capability, **asked)
    return wish, locate(model, fetch=False, to_plan=True, chosen=chosen_map(wish)).source


def chosen_map(wish: Wish) -> str | None:
    """The map that --set names."""
    from compressor.plan.recipe_file import apply_override

    data: dict[str, Any] = {}
    for override in wish.overrides:
        if override.startswith("map="):
            apply_override(data, override)
    found = data.get("map")
    return found if found is None else str(found)


def mixed(
    wish: Wish, bits: float, source: Source, target: Path, *, device: str, told: Told
) -> Choice:
    """Measure what each layer costs, and choose each one's bits."""
    from compressor.checkpoint.find import locate
    from compressor.run.by_size import sensitivity_file
    from compressor.run.mixed import prepare_mixed
    from compressor.run.session import choose_device

    prepared = prepare_mixed(wish, bits, source)
    display, target = told.display(), target.expanduser()
    with display.stage("measure", len(source.layout.blocks)):
        found = prepared.sensitivity(
            locate(wish.model, fetch=True, chosen=chosen_map(wish)).source,
            sensitivity_file(target),
            device=choose_device(device),
            progress=display.unit,
        )
    return prepared.choice(found, source)


def _save(choice: Choice, target: Path) -> Path:
    """Write the recipe beside the output. Raises InputError where another one lies there."""
    from compressor.errors import InputError
    from compressor.plan.recipe_file import read_recipe

    target = target.expanduser()
    file = target.with_name(f"{target.name}.yaml")
    if file.exists():
        if read_recipe(file) != choice.data:
            raise InputError(
                f"{file} is there and is another recipe",
                hint=f"compress run {file} runs that one; delete it, or name another --output",
            )
        return file
    write_file(file, choice.text().encode())
    return file
