"""Which heads need the whole context, and what it costs to let the others stream.

Trains DuoAttention's gates on a model, scores its retrieval heads, and compares at several shares
of streaming heads: trained gates, copy scores in place of gates, and heads at random over several
seeds. One training serves all shares. Each choice is judged by passkey retrieval and by perplexity
on held-out text. Prints a table and JSON, and writes heat maps and curves as PNG, and all of it as
one page, report.html. Run again with the same settings, training goes on from its last saved step
in the folder --out.

    python scripts/measure/heads.py MODEL --out heads
    python scripts/measure/heads.py MODEL --out heads --device cuda --lengths 4096 8192 \\
        --train-lengths 1024 4096 --window 256 --sinks 16 --num-steps 100 --floor 0.7 \\
        --ppl-length 4096 \\
        --needle '\\n\\nThe {ordinal} passkey is: {passkey}. Remember it.\\n\\n' \\
        --question '\\n\\nThe {ordinal} passkey is: {passkey}'
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import time
from html import escape
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from compressor_calibration.tokens import TokenSet
from torch import Tensor

from compressor.attention.evaluation import policy_attention
from compressor.attention.rules.streaming import streaming_policy
from compressor.checkpoint.find import locate
from compressor.checkpoint.records import Records
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.evaluate.passkey import Passkey, passkey
from compressor.evaluate.perplexity import evaluate
from compressor.methods.common.context import LearnContext
from compressor.methods.common.head_plots import curves, heat_map
from compressor.methods.common.needles import Needles
from compressor.methods.duo_attention.method import DuoAttention
from compressor.methods.retrieval_heads import RetrievalHeads
from compressor.numerics.head_gates import keep_full
from compressor.run.session import choose_device
from compressor.runner.source_model import SourceModel

NEEDLE = "\n\nRemember this, the {ordinal} passkey is: {passkey}.\n\n"
QUESTION = "\n\nWhat is the {ordinal} passkey? It is: {passkey}"


def text(value: str) -> str:
    """A template of the command line, in which \\n is a new line."""
    return value.replace("\\n", "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder, GGUF file or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG and JSON files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--reg-weight", type=float, default=0.05)
    parser.add_argument("--regularizer", default="l1", choices=["l1", "hoyer2"])
    parser.add_argument("--batch", type=int, default=1, help="rows in a training step")
    parser.add_argument("--train-lengths", type=int, nargs=2, default=(384, 768))
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--words", type=int, default=4)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024],
        help="passkey rows; lengths at which full attention retrieves less than --floor are named "
        "and left out",
    )  # fmt: skip
    parser.add_argument("--needle", default=NEEDLE, type=text, help="what is hidden")
    parser.add_argument("--question", default=QUESTION, type=text, help="what is asked")
    parser.add_argument("--floor", type=float, default=0.9)
    parser.add_argument("--rows", type=int, default=2, help="passkey rows for each depth")
    parser.add_argument(
        "--passkey-seeds", type=int, nargs="+", default=[0],
        help="of the passkeys and their places; each gives rows of its own. Settings that were "
        "chosen on some passkeys are to be judged on others",
    )  # fmt: skip
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, default=3, help="random choices for each share")
    parser.add_argument("--windows", type=int, default=4, help="rows of the perplexity")
    parser.add_argument("--ppl-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Measure:
    """One model with its texts and its two yardsticks."""

    def __init__(self, source: Source, tokenizer: Any, options: argparse.Namespace) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.options = options
        self.device = choose_device(options.device)
        cuda = self.device.type == "cuda"
        self.dtype = source.checkpoint.dtype if cuda else torch.float32
        self.lengths = tuple(options.lengths)
        self.text = bundled_text("held_out", "fiction")
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        rows, length = options.windows, options.ppl_length
        self.ids = torch.tensor(ids[: rows * length]).reshape(-1, length)

    def passkeys(self, streaming: Tensor | None, lengths: tuple[int, ...]) -> dict[str, float]:
        """Passkey accuracy by length and depth, its mean, and the share found whole; means over
        all passkey seeds, and accuracies by seed."""
        needle, question = (
            template.format(ordinal="first", passkey="{passkey}")
            for template in (self.options.needle, self.options.question)
        )
        seeds = self.options.passkey_seeds
        sums: dict[str, float] = {}
        by_seed: dict[str, float] = {}
        for seed in seeds:
            task = Passkey(
                lengths=lengths, rows=self.options.rows, seed=seed, needle=needle,
                question=question,
            )  # fmt: skip
            found = passkey(
                self.source, self.tokenizer, haystack=self.text, task=task, device=self.device,
                dtype=self.dtype, attention=self._attention(streaming),
            )  # fmt: skip
            by_seed[f"seed {seed}"] = found.accuracy.value
            values = {"accuracy": found.accuracy.value, "exact": found.exact.value}
            values |= {f"{c.length}@{c.depth:g}": c.accuracy for c in found.cells}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(seeds)
        return {**sums, **by_seed}

    def perplexity(self, streaming: Tensor | None) -> float:
        """Perplexity over held-out text."""
        found = evaluate(
            self.source, self.ids, device=self.device, dtype=self.dtype,
            attention=self._attention(streaming),
        )  # fmt: skip
        return found.perplexity.value

    def _attention(self, streaming: Tensor | None) -> Any:
        if streaming is None:
            return lambda unit: None
        policy = streaming_policy(
            self.source.layout, streaming, sinks=self.options.sinks, window=self.options.window
        )
        return policy_attention(policy)


def learned(measure: Measure, options: argparse.Namespace) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Trained gates and copy scores, both [layers, kv_heads], and what there is to say of them."""
    model = SourceModel(measure.source, device=measure.device, dtype=measure.dtype)
    shortest, longest = options.train_lengths
    data = Needles(
        keys=options.keys, words=options.words, min_length=shortest, max_length=longest, lengths=8,
        prefix="", suffix="", separator="", needle=options.needle, question=options.question,
    )  # fmt: skip
    text = bundled_text("calibration", "prose")[: 40 * longest + 200_000]
    ids = torch.tensor(measure.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    tokens = TokenSet(ids=ids, sha256="", source="bundled", sampling="consecutive")
    about: dict[str, Any] = {}
    started = time.perf_counter()

    def progress(name: str, done: int, total: int) -> None:
        if name == "duo_attention" and done % 20 == 0:
            print(f"  step {done}/{total}  {time.perf_counter() - started:.0f} s", flush=True)

    scratch = Records(options.out / "scratch", _settings(options))
    context = LearnContext(
        tokens=tokens, seed=options.seed, batch=2, scratch=scratch, progress=progress
    )
    scoring = data.model_copy(update={"min_length": longest, "lengths": 1})
    heads = RetrievalHeads(data=scoring, rows=4, sinks=options.sinks, window=options.window).learn(
        model, context
    )
    about["scores_seconds"] = time.perf_counter() - started
    started = time.perf_counter()
    gates = DuoAttention(
        data=data, sinks=options.sinks, window=options.window, num_steps=options.num_steps,
        lr=options.lr, reg_weight=options.reg_weight, regularizer=options.regularizer,
        batch=options.batch,
    ).learn(model, context)  # fmt: skip
    about["gates_seconds"] = time.perf_counter() - started
    for name, data_ in {**heads.plots, **gates.plots}.items():
        (options.out / name).write_bytes(data_)
    trained = gates.value.gates
    scores = heads.value.scores
    about["copy_scores"] = heads.rows[0]
    about["gates"] = gates.rows[-1]
    by_kv = scores.reshape(len(scores), trained.shape[1], -1).amax(-1)
    picture = heat_map(by_kv / by_kv.max(), title="Copy scores of KV heads, relative")
    if picture is not None:
        (options.out / "copy_scores_kv.png").write_bytes(picture)
    return trained, by_kv, about


def _settings(options: argparse.Namespace) -> str:
    """What the training follows; another training's steps in the folder are not seen."""
    names = (
        "model", "seed", "sinks", "window", "num_steps", "lr", "reg_weight", "regularizer", "batch",
        "train_lengths", "keys", "words", "needle", "question",
    )  # fmt: skip
    return json.dumps({name: getattr(options, name) for name in names})


def choices(options: argparse.Namespace, gates: Tensor, scores: Tensor, share: float) -> Any:
    """Name → which heads stream, for one share."""
    full = keep_full(gates, share)
    yield "gates", ~full
    yield "copy scores", ~keep_full(scores, share)
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(gates.numel(), generator=generator)
        streaming = torch.zeros(gates.numel(), dtype=torch.bool)
        streaming[order[: int((~full).sum())]] = True
        yield f"random {seed}", streaming.reshape(gates.shape)


def main() -> None:
    options, began = arguments(), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    random.seed(options.seed)
    located = locate(options.model, fetch=True)
    source = located.source
    from compressor.runner.tokenizer import load_tokenizer

    measure = Measure(source, load_tokenizer(source.checkpoint.folder), options)
    kept = []
    for length in options.lengths:
        accuracy = measure.passkeys(None, (length,))["accuracy"]
        print(f"full attention at {length} tokens: passkey accuracy {accuracy:.3f}", flush=True)
        if accuracy >= options.floor:
            kept.append(length)
    if not kept:
        raise InputError("full attention retrieves at none of these lengths", hint="shorter ones")
    measure.lengths = tuple(kept)
    shortest, longest = options.train_lengths
    # Rows that the model cannot answer teach nothing.
    options.train_lengths = (min(shortest, max(kept)), min(longest, max(kept)))
    gates, scores, about = learned(measure, options)
    rows: list[dict[str, Any]] = []

    def add(name: str, share: float, streaming: Tensor | None) -> None:
        found = measure.passkeys(streaming, measure.lengths)
        row = {"heads": name, "share": share, "perplexity": measure.perplexity(streaming), **found}
        rows.append(row)
        print(
            f"{name:12} {share:5.0%} streaming  passkey {row['accuracy']:.3f}  whole "
            f"{row['exact']:.3f}  perplexity {row['perplexity']:.2f}",
            flush=True,
        )

    add("full", 0.0, None)
    for share in options.shares:
        for name, streaming in choices(options, gates, scores, share):
            add(name, share, streaming)
    add("all", 1.0, torch.ones_like(gates, dtype=torch.bool))
    draw(options, rows)
    write_report(options, source.checkpoint.folder.name, kept, rows)
    result = {
        "model": source.checkpoint.folder.name, "device": str(measure.device),
        "sinks": options.sinks, "window": options.window, "lengths": kept,
        "seconds": time.perf_counter() - began, **about,
        "gate_values": gates.tolist(), "copy_scores_kv": scores.tolist(), "rows": rows,
    }  # fmt: skip
    (options.out / "heads.json").write_text(json.dumps(result, indent=1))
    print(
        json.dumps(
            {
                "gates_seconds": round(about["gates_seconds"], 1),
                "seconds": round(time.perf_counter() - began, 1),
                "lengths": kept,
            }
        )
    )


def draw(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Curves of both yardsticks over the share of streaming heads."""
    ends = {0.0: rows[0], 1.0: rows[-1]}
    titles = {
        "accuracy": "passkey accuracy", "exact": "passkeys found whole",
        "perplexity": "held-out perplexity",
    }  # fmt: skip
    for what, title in titles.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for name in ("gates", "copy scores", "random"):
            points = [(0.0, ends[0.0][what])]
            for share in sorted(options.shares):
                values = [
                    r[what] for r in rows if r["heads"].startswith(name) and r["share"] == share
                ]
                points.append((share, sum(values) / len(values)))
            lines[name] = [*points, (1.0, ends[1.0][what])]
        picture = curves(lines, title=title, x="share of streaming KV heads", y=title)
        if picture is not None:
            (options.out / f"{what}.png").write_bytes(picture)


def write_report(
    options: argparse.Namespace, model: str, lengths: list[int], rows: list[dict[str, Any]]
) -> None:
    """The table and every picture of the folder as one page that stands alone."""
    columns = ("heads", "share", "accuracy", "exact", "perplexity")
    columns += tuple(name for name in rows[0] if name not in columns)
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr>"]
    for row in rows:
        shown = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in map(row.get, columns))
        lines.append("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in shown) + "</tr>")
    pictures = [
        f'<p><img alt="{path.stem}" style="max-width:100%" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for path in sorted(options.out.glob("*.png"))
    ]
    title = f"Heads of {escape(model)}: {options.sinks} sinks, a window of {options.window}"
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        f"<p>Passkeys in rows of {', '.join(map(str, lengths))} tokens.</p>"
        f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>{"".join(pictures)}'
    )
    (options.out / "report.html").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
