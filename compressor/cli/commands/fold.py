"""compress fold"""

from pathlib import Path

import click

from compressor.cli.display import size
from compressor.cli.echo import say
from compressor.cli.options import FOLDER, Told, folder_argument, telling_options


@click.command()
@click.argument("model", type=FOLDER)
@folder_argument("output")
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    metavar="NAME=IMAGE",
    help="An image, or a safetensors file with pixel_values. Repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="A text to be folded whole, with a placeholder behind each subject's word. Repeatable.",
)
@click.option("--placeholder", default="<|image|>")
@click.option("--known", type=FOLDER, help="A folder with subjects that were folded before.")
@click.option("--steps", default=50, type=click.IntRange(1))
@click.option("--alpha", type=click.FloatRange(0, 1), help="Share of the steps with fused texts.")
@click.option("--start", type=click.IntRange(0), help="Last step with the plain text.")
@click.option("--encoder", default="image_encoder", help="Prefix of names.")
@click.option("--fuse", default="postfuse_module", help="Prefix of names.")
@click.option("--text-encoder", "text", default="text_encoder", help="Prefix of names.")
@telling_options
def command(
    model: Path,
    output: Path,
    subjects: tuple[str, ...],
    texts: tuple[str, ...],
    placeholder: str,
    known: Path | None,
    steps: int,
    alpha: float | None,
    start: int | None,
    told: Told,
    **parts: str,
) -> None:
    """Put vectors of subjects in place of the image encoder of a FastComposer model.

    MODEL is a folder with its weights as safetensors and the config.json of its CLIP, OUTPUT a new
    one without the encoder: conditions.safetensors holds a vector for each subject and, for each
    --text, its embeddings plain and fused; conditions.json says which encoder made them, and with
    --alpha or --start from which step of a sampler fused embeddings count. Embeddings are the same
    as with the encoder; images are not made and not judged here.

    \b
    compress fold ./fastcomposer ./folded --subject einstein=einstein.png --start 10
    compress fold ./fastcomposer ./folded --subject a=a.png --text 'a man <|image|> at sea'
    compress fold ./fastcomposer ./more --known ./folded --subject b=b.png --alpha 0.7 --json
    """
    from compressor.checkpoint.conditions import Schedule, read_conditions
    from compressor.numerics.subject_fusion import start_of, text_steps
    from compressor.run.fold import Parts, fold

    if alpha is not None and start is not None:
        raise click.UsageError("--alpha and --start both say when fused texts begin: keep one")
    named: dict[str, Path] = {}
    for entry in subjects:
        name, equals, path = entry.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"--subject {entry}: write NAME=IMAGE, the name as a word")
        named[name] = Path(path).expanduser()
    begin = start_of(alpha, steps) if alpha is not None else start
    schedule = (
        None
        if begin is None
        else Schedule(steps=steps, start=begin, text_steps=text_steps(steps, begin))
    )
    display = told.display()
    with display.stage("fold", len(named)):
        done = fold(
            model.expanduser(),
            output.expanduser(),
            subjects=named,
            texts=texts,
            placeholder=placeholder,
            schedule=schedule,
            parts=Parts(**parts),
            known=None if known is None else read_conditions(known),
            progress=display.unit,
        )
    record = done.conditions.record
    vectors = sum(tensor.nbytes for tensor in done.conditions.tensors.values())
    lines = [
        f"{done.output}: {len(record.subjects)} subjects in {size(vectors)}",
        f"  {size(done.dropped)} of the encoder left out, {size(done.kept)} kept",
    ]
    if record.schedule is not None:
        lines.append(f"  plain text in the first {record.schedule.text_steps} of {steps} steps")
    say(done.to_json(), lines, as_json=told.as_json)
