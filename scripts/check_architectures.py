"""Goes through every family with a tiny seeded model and writes what was seen to
docs/architectures.md.

python scripts/check_architectures.py               all families, about ten minutes
python scripts/check_architectures.py llama lfm2    their rows anew, the others as they are
"""

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tables import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architectures.md"
sys.path.insert(0, str(ROOT))

from compressor.arch.load import known_model_types  # noqa: E402
from compressor.checkpoint.reader import open_checkpoint  # noqa: E402
from compressor.checkpoint.source import open_source  # noqa: E402
from tests.support import family_checks as checks  # noqa: E402
from tests.support.tiny_models import MORE_TYPES, TYPES, build  # noqa: E402

COLUMNS = {
    "tensors": "every tensor of the checkpoint that transformers saved has one place",
    "linears": "the map's linears are transformers' own, and its expert slices",
    "forward": "our logits are transformers'",
    "folds": "no fold changes what a block computes, with random norms, gates and biases",
    "rtn": "rounded to 8 bits from end to end, and what is written gives our logits when loaded",
    "awq": "the same with scales searched in every fold",
    "gptq": "the same with second-order rounding, experts by the tokens that they saw",
}

BESIDE = ("loaded in transformers", "draft")


def seen(family: str, folder: Path) -> dict[str, str]:
    """Column → `yes`, or what went wrong."""
    build(family, folder / "model")
    source = open_source(folder / "model")
    stream = checks.streamed(source)
    with stream.logits() as head:
        ours = torch.stack([head(hidden) for hidden in stream.hidden])

    def compiled(method: str) -> None:
        step = {method: {"bits": 8, "group_size": 8}}
        checks.compiled_and_loaded(source, ours, folder / method, step)

    tries: dict[str, Callable[[], None]] = {
        "tensors": lambda: checks.every_tensor_has_one_place(source, folder / "model"),
        "linears": lambda: checks.every_linear_is_one(source, stream),
        "forward": lambda: torch.testing.assert_close(
            ours, checks.logits_of_transformers(folder / "model")
        ),
        "folds": lambda: checks.no_fold_changes_what_a_block_computes(source, stream),
        **{method: (lambda method=method: compiled(method)) for method in ("rtn", "awq", "gptq")},
    }
    found = {}
    for column, check in tries.items():
        try:
            check()
            found[column] = "yes"
        except Exception as error:  # a table of what was seen has failures too
            print(f"{family}: {column}: {type(error).__name__}: {error}", file=sys.stderr)
            found[column] = "no"
    loaded = "its floats" if checks.holds_no_packed_weights(source) else "packed"
    return found | {"loaded in transformers": loaded, "draft": drafted(folder / "model")}


def drafted(model: Path) -> str:
    """Whether a drafted map is the one that is used."""
    try:
        marks = checks.marks_of_an_equal_draft(open_checkpoint(model))
    except Exception:  # whatever a draft that is no map meets
        marks = None
    return "by hand" if marks is None else f"equal, {marks} marked" if marks else "equal"


def page(rows: dict[str, dict[str, str]]) -> str:
    """docs/architectures.md."""
    unseen = sorted(set(known_model_types()) - {family.partition(" ")[0] for family in rows})
    head = ["model type", *COLUMNS, *BESIDE]
    lines = [
        "# Architectures",
        "<!-- Written by scripts/check_architectures.py from what it saw; run that instead. -->",
        f"Seen with transformers {transformers.__version__}, on tiny seeded models with random "
        "norms, gates and biases that transformers saved:",
        "\n".join(f"- **{column}**: {what}" for column, what in COLUMNS.items())
        + "\n- **loaded in transformers**: packed, or as the floats that the codes stand for, "
        "where transformers keeps those weights in what is no linear of its own (stacked experts, "
        "GPT-2's and Falcon's modules) and loads no codes into them; vLLM and SGLang look packed "
        "experts up one by one, under the names that are written\n"
        "- **draft**: `compress map draft` gives this map, up to places that it marks as unsure; "
        "else it is by hand",
        "A name after the type is another of its layouts. In a model with a tower or with layers "
        "for several tokens at once these are carried over byte for byte; calibration is of text.",
        markdown(
            head,
            ([f"`{f}`", *(row[column] for column in head[1:])] for f, row in sorted(rows.items())),
        ),
        "Maps of types that transformers has no class for by itself, bound against names alone: "
        + ", ".join(f"`{name}`" for name in unseen)
        + ". Text models are seen inside the models that hold them; Kimi K2 and K2.5 run "
        "through DeepSeek-V3's class, MiniCPM through Granite's.",
        "Not mapped: Gemma 3n, whose blocks take four streams of hidden states at once, predicted "
        "from each other (AltUp), where rows carry one here. Without a map (`map: none`) its "
        "weights are rounded.",
    ]
    return "\n\n".join(lines) + "\n"


def written() -> dict[str, dict[str, str]]:
    """The rows that the page has, of families that there still are."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        family, *values = (part.strip("` ") for part in line.strip("|").split("|"))
        if line.startswith("| `") and family in (*TYPES, *MORE_TYPES):
            rows[family] = dict(zip((*COLUMNS, *BESIDE), values, strict=True))
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    families = parser.parse_args().families
    transformers.logging.set_verbosity_error()
    rows = written() if families else {}
    for family in families or (*TYPES, *MORE_TYPES):
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = seen(family, Path(folder))
        print(family, rows[family], flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
