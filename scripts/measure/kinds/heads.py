"""Which heads need the whole context, and what it costs to let the others stream.

Trains DuoAttention's gates on a model, scores its retrieval heads, and compares at several shares
of streaming heads: trained gates, copy scores in place of gates, and heads at random over several
seeds. One training serves all shares; run again with the same --out, it goes on from its last step.

    python scripts/measure/run.py heads MODEL --out heads
    python scripts/measure/run.py heads MODEL --out heads --device cuda --lengths 4096 8192 \\
        --train-lengths 1024 4096 --window 256 --sinks 16 --num-steps 100 --floor 0.7 \\
        --ppl-length 4096 \\
        --needle '\\n\\nThe {ordinal} passkey is: {passkey}. Remember it.\\n\\n' \\
        --question '\\n\\nThe {ordinal} passkey is: {passkey}'
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from compressor_calibration.bundled import bundled_text
from compressor_calibration.tokens import TokenSet
from torch import Tensor
from variant import Bench, Figures, Variant
from ways import Ways, records, token_rows, whole_model

from compressor.attention.evaluation import policy_attention
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.evaluate.passkey import Passkey
from compressor.methods.common.context import LearnContext
from compressor.methods.common.needles import Needles
from compressor.methods.duo_attention.method import DuoAttention
from compressor.methods.retrieval_heads import RetrievalHeads
from compressor.numerics.head_gates import keep_full
from compressor.runner.source_model import SourceModel

NEEDLE = "\n\nRemember this, the {ordinal} passkey is: {passkey}.\n\n"
QUESTION = "\n\nWhat is the {ordinal} passkey? It is: {passkey}"
TRAINING = ("sinks", "window", "num_steps", "lr", "reg_weight", "regularizer")
FOLLOWS = ("model", *TRAINING, "rows_per_step", "train_lengths", "keys", "words", "needle",
           "question", "seed")  # fmt: skip


def template(value: str) -> str:
    """Of the command line, in which \\n is a new line."""
    return value.replace("\\n", "\n")


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="checkpoint folder, GGUF file or Hub id")
    add("--out", type=Path, help="folder for the training's steps and its pictures")
    add("--sinks", type=int, default=4)
    add("--window", type=int, default=64)
    add("--num-steps", type=int, default=120)
    add("--lr", type=float, default=0.05)
    add("--reg-weight", type=float, default=0.05)
    add("--regularizer", default="l1", choices=["l1", "hoyer2"])
    add("--rows-per-step", type=int, default=1)
    add("--train-lengths", type=int, nargs=2, default=(384, 768))
    add("--keys", type=int, default=4)
    add("--words", type=int, default=4)
    add("--lengths", type=int, nargs="+", default=[1024], help="tokens of passkey rows")
    add("--floor", type=float, default=0.9,
        help="lengths at which full attention finds less of the passkeys are left out")  # fmt: skip
    add("--needle", default=NEEDLE, type=template, help="what is hidden")
    add("--question", default=QUESTION, type=template, help="what is asked")
    add("--rows", type=int, default=2, help="passkey rows for each depth")
    add("--passkey-seeds", type=int, nargs="+", default=[0],
        help="each gives rows of its own: settings that were chosen on some passkeys are to be "
        "judged on others")  # fmt: skip
    add("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    add("--seeds", type=int, default=3, help="random choices for each share")
    add("--windows", type=int, default=4, help="rows of the perplexity")
    add("--ppl-length", type=int, default=1024)
    add("--seed", type=int, default=0)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    model = whole_model(bench, options.model)
    text = bundled_text("held_out", "fiction")
    ids = token_rows(model, text, options.windows, options.ppl_length)

    def ways(lengths: tuple[int, ...]) -> Ways:
        needle, question = (
            value.format(ordinal="first", passkey="{passkey}")
            for value in (options.needle, options.question)
        )
        same = {"rows": options.rows, "needle": needle, "question": question}
        tasks = [Passkey(lengths=lengths, seed=seed, **same) for seed in options.passkey_seeds]
        return Ways(bench, model, ids, haystack=text, tasks=tasks)

    full = {length: ways((length,)).figures(None) for length in options.lengths}
    kept = tuple(n for n, found in full.items() if found["passkey"] >= options.floor)
    for length, found in full.items():
        print(f"full attention, {length} tokens: {found['passkey']:.3f} of passkeys", flush=True)
    if not kept:
        raise InputError("full attention retrieves at none of these lengths", hint="shorter ones")
    judged = ways(kept)

    def measure(streaming: Tensor) -> Figures:
        where = {"sinks": options.sinks, "window": options.window}
        policy = streaming_policy(model.source.layout, streaming, **where)
        return judged.figures(policy_attention(policy))

    yield Variant("full", lambda: judged.figures(None))
    gates, scores = learned(bench, model, longest=max(kept))
    for share in options.shares:
        for name, streaming in choices(gates, scores, share, seeds=options.seeds):
            yield Variant(f"{share:.0%} {name}", lambda s=streaming: measure(s), baseline="full")
    yield Variant("all", lambda: measure(torch.ones_like(gates, dtype=torch.bool)))


def learned(bench: Bench, model: SourceModel, *, longest: int) -> tuple[Tensor, Tensor]:
    """Trained gates and copy scores, both [layers, kv_heads]. Rows longer than `longest`, which the
    model cannot answer, teach nothing."""
    options = bench.options
    low, high = (min(length, longest) for length in options.train_lengths)
    data = Needles(
        keys=options.keys, words=options.words, min_length=low, max_length=high, lengths=8,
        prefix="", suffix="", separator="", needle=options.needle, question=options.question,
    )  # fmt: skip
    ids = token_rows(model, bundled_text("calibration", "prose"), 1, 10 * high)
    context = LearnContext(
        tokens=TokenSet(ids=ids, sha256="", source="bundled", sampling="consecutive"),
        seed=options.seed,
        batch=2,
        scratch=records(bench, options.out and options.out / "scratch", *FOLLOWS),
        progress=lambda name, done, total: None,
    )
    started = time.perf_counter()
    scoring = data.model_copy(update={"min_length": high, "lengths": 1})
    where = {"sinks": options.sinks, "window": options.window}
    heads = RetrievalHeads(data=scoring, rows=4, **where).learn(model, context)
    scored = time.perf_counter()
    training = {name: getattr(options, name) for name in TRAINING}
    duo = DuoAttention(data=data, batch=options.rows_per_step, **training)
    gates = duo.learn(model, context)
    seconds = time.perf_counter() - scored
    print(f"copy scores {scored - started:.1f} s, gates {seconds:.1f} s", flush=True)
    for name, picture in {**heads.plots, **gates.plots}.items() if options.out else ():
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / name).write_bytes(picture)
    trained = gates.value.gates
    scores = heads.value.scores
    return trained, scores.reshape(len(scores), trained.shape[1], -1).amax(-1)


def choices(
    gates: Tensor, scores: Tensor, share: float, *, seeds: int
) -> Iterator[tuple[str, Tensor]]:
    """Name → which heads stream, for one share."""
    full = keep_full(gates, share)
    yield "gates", ~full
    yield "copy scores", ~keep_full(scores, share)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(gates.numel(), generator=generator)
        streaming = torch.zeros(gates.numel(), dtype=torch.bool)
        streaming[order[: int((~full).sum())]] = True
        yield f"random {seed}", streaming.reshape(gates.shape)
