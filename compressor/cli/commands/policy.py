"""compress policy"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.echo import say
from compressor.cli.groups import Group
from compressor.cli.options import FOLDER, folder_argument, json_option

if TYPE_CHECKING:
    from compressor.attention.policy import AttentionPolicy


@click.group(cls=Group)
def command() -> None:
    """Show a checkpoint's attention policy, or export it for another runtime.

    \b
    compress run recipes/llama3-duo-attention.yaml              # make one
    compress policy show out/llama3-8b-duo                      # what it keeps
    compress policy export out/llama3-8b-duo ./duo --form lserve
    """


@command.command()
@click.argument("checkpoint", type=FOLDER)
@json_option
def show(checkpoint: Path, as_json: bool) -> None:
    """Which heads stream, which blocks of keys are chosen, and what the cache saves.

    \b
    compress policy show out/llama3-duo
    compress policy show out/llama3-duo --json > policy.json
    compress policy show out/llama3-infllm && compress eval out/llama3-infllm --passkey
    """
    from compressor.attention.policy import describe

    policy = _policy(checkpoint)
    lines = [*describe(policy)]
    for length in (4096, 32768):
        whole = length * len(policy.layers) * policy.kv_heads
        share = policy.cached_tokens(length) / whole
        lines.append(f"a text of {length} tokens keeps {share:.1%} of its keys and values")
    for number, heads in enumerate(policy.whole_heads()):
        lines.append(f"  layer {number:>3}  {''.join('#' if head else '.' for head in heads)}")
    say({"ok": True, **policy.to_json()}, lines, as_json=as_json)


@command.command()
@click.argument("checkpoint", type=FOLDER)
@folder_argument("folder")
@click.option(
    "--form",
    metavar="FORM",
    default="duo-attention",
    help="duo-attention: full_attention_heads.tsv and config.json, which LServe reads too; lserve: "
    "these and the sizes of its pages; config: what ModelOpt and TensorRT-LLM (BLASST) and "
    "MiniCPM4 (InfLLM-V2) read in config.json.",
)
@json_option
def export(checkpoint: Path, folder: Path, form: str, as_json: bool) -> None:
    """Write the policy of CHECKPOINT into FOLDER, a new one, as another runtime reads it.

    \b
    compress policy export out/llama3-duo ./duo-policy
    compress policy export out/llama3-duo -o ./duo-policy
    compress policy export out/llama3-duo ./lserve-policy --form lserve
    compress policy export out/smollm2-blasst ./blasst-policy --form config
    """
    from compressor.attention.forms import policy_forms
    from compressor.attention.policy import read_policy_tensors
    from compressor.errors import InputError, nearest

    forms = policy_forms()
    if form not in forms:
        raise InputError(f"unknown form {form!r}", hint=nearest(form, sorted(forms)))
    policy = _policy(checkpoint)
    tensors = read_policy_tensors(checkpoint)
    files = forms[form](policy, tensors, model=checkpoint.resolve().name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not a new folder", hint="nothing is ever overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    line = f"wrote {', '.join(sorted(files))} into {folder}"
    say({"ok": True, "form": form, "files": sorted(files)}, [line], as_json=as_json)


def _policy(checkpoint: Path) -> AttentionPolicy:
    from compressor.attention.policy import check_policy, read_policy
    from compressor.attention.token_classes import POLICY_NAME, read_sizes
    from compressor.checkpoint.reader import open_checkpoint
    from compressor.checkpoint.source import open_source
    from compressor.errors import InputError

    policy = read_policy(checkpoint)
    if policy is None and (sizes := read_sizes(checkpoint)) is not None:
        raise InputError(
            f"{checkpoint} has no policy of heads, but of a video stream: {sizes.describe()}",
            hint=f"VideoStream of compressor.attention.serve.stream reads {POLICY_NAME} as it is",
        )
    if policy is None:
        open_checkpoint(checkpoint)  # which says what it is, if it is none
        raise InputError(
            f"{checkpoint} carries no attention policy",
            hint="a pass such as duo_attention makes one: compress recipes llama3-duo-attention",
        )
    check_policy(policy, open_source(checkpoint).layout)
    return policy
