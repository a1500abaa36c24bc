"""Forecasts trained on a model, and every way of choosing blocks at one budget.

    python scripts/measure/run.py forecast MODEL --length 1024 --block 16 --kernel 8 --stride 4 \\
        --local 4 --top-k 12

For the forecast (SparDA), InfLLM-V2's selector, Quest's bounds on the same blocks, and the most
recent blocks: recall of the teacher's blocks and share of attention (means over layers), perplexity
of held-out targets that lie beyond the budget, and passkeys. Texts are the bundled ones, or --text
for training.

The published claims are for bases that were trained with block-sparse attention. A dense model's
attention is spread wider, so its perplexity under a small budget says how sparse the model is
rather than how good a scorer is; recall and share of attention compare the scorers.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from compressor_calibration.bundled import bundled_text
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import TokenSet
from compressor_kernels.attention.block_windows import WindowRule
from torch import Tensor
from variant import Bench, Figures, Variant
from ways import Ways, records, token_rows, whole_model

from compressor.attention.evaluation import policy_attention, under_masks
from compressor.attention.key_blocks import KeyBlocks, recent_blocks
from compressor.attention.policy import rule_policy
from compressor.checkpoint.source import Source
from compressor.evaluate.passkey import Passkey
from compressor.ir.unit import Unit
from compressor.methods.sparda.choice_quality import means
from compressor.methods.sparda.choice_record import held_out, record_choices, scorers
from compressor.methods.sparda.method import SparDA
from compressor.methods.sparda.teacher import Teacher
from compressor.methods.sparda.training import Trainer
from compressor.plan.calibration import Calibration
from compressor.run.tokens import calibration_tokens
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Attending

SIZES = {
    "block_size": ("--block", 64),
    "kernel_size": ("--kernel", 32),
    "stride": ("--stride", 16),
    "init_blocks": ("--init", 1),
    "local_blocks": ("--local", 4),
    "top_k": ("--top-k", 12),
    "steps": ("--steps", 40),
    "rows_per_step": ("--rows-per-step", 4),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.set_defaults(batch=2)
    for name, (flag, default) in SIZES.items():
        parser.add_argument(flag, dest=name, type=int, default=default, metavar="N")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--text", default="bundled/prose", help="training text: a recipe's data")
    parser.add_argument(
        "--same-text",
        action="store_true",
        help="measure on the last 15 percent of the training text, not on the other bundled text",
    )
    parser.add_argument("--rows", type=int, default=32, help="training rows")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--initial", choices=["uniform", "queries"], default="queries")
    parser.add_argument("--states", choices=["chosen", "full"], default="chosen")
    parser.add_argument("--held-out", type=int, default=2, help="rows for recall and perplexity")
    parser.add_argument("--passkeys", type=int, default=2, help="passkey rows at each depth")


def texts(bench: Bench, model: SourceModel) -> tuple[Tensor, TokenSet, str]:
    """Training rows, rows to measure on, and a text to hide passkeys in."""
    options, data = bench.options, bench.options.text
    rest = bundled_text("held_out", "fiction")
    if options.same_text:
        documents = read_documents(data, part="calibration")
        whole = "".join(document.text for document in documents)
        cut = int(len(whole) * 0.85)
        (bench.work / "text.txt").write_text(whole[:cut], "utf-8")
        data, rest = str(bench.work / "text.txt"), whole[cut:]
    wanted = Calibration(data=data, samples=options.rows, length=options.length)
    rows = calibration_tokens(model.tokenizer(), wanted, seed=0).ids
    if options.same_text:
        ids = token_rows(model, rest, options.held_out, options.length)
        return rows, TokenSet(ids=ids, sha256="", source=data, sampling="consecutive"), rest
    text = held_out(model.tokenizer(), rows=options.held_out, length=options.length)
    return rows, text, rest


def train(bench: Bench, model: SourceModel, ids: Tensor, settings: SparDA) -> dict[str, Tensor]:
    """Forecast tensors by name, rounded as a checkpoint would store them."""
    found = Trainer(
        model,
        ids,
        settings.training,
        seed=0,
        batch=bench.options.batch,
        scratch=records(bench, None),
        progress=lambda name, done, total: print(f"  trained {name}", flush=True),
    ).run()
    for number, (first, last) in enumerate(found.losses):
        print(f"  layer {number:2}: loss {first:.4f} -> {last:.4f}")
    blocks = [unit for unit in model.layout.units if unit.kind == "block"]
    named = found.named([unit.attention_path for unit in blocks])
    return {name: tensor.to(torch.bfloat16) for name, tensor in named.items()}


def attending(
    source: Source, selection: KeyBlocks | None, recent: KeyBlocks, forecasts: dict[str, Tensor]
) -> Attending:
    """How blocks attend under one scorer; None for the most recent blocks."""
    if selection is None:

        def hook(call: AttentionCall) -> Tensor:
            blocks = recent_blocks(recent, call.query, call.key)
            seen = recent.seen_in(blocks, call.key.shape[2])
            return under_masks(call, [(range(call.key.shape[1]), seen)])

        return lambda unit: hook
    inner = policy_attention(rule_policy(source.layout, selection, made_by={}))

    def of_unit(unit: Unit) -> AttentionHook | None:
        own = {n: t for n, t in forecasts.items() if n.startswith(f"{unit.layout.name}.")}
        return inner(replace(unit, extra={**unit.extra, **own}))

    return of_unit


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    model = whole_model(bench, options.model, dtype=torch.float32)
    settings = SparDA(
        **{name: getattr(options, name) for name in SIZES}, dense_below=0,
        learning_rate=options.learning_rate, states=options.states, initial=options.initial,
    )  # fmt: skip
    selection = settings.block_choice
    training, text, haystack = texts(bench, model)
    forecasts = train(bench, model, training, settings)
    teacher = Teacher(selection=selection, fine=WindowRule(kernel_size=2, stride=1))
    quality = means(record_choices(model, teacher, forecasts, text).layers)
    scored = torch.zeros(text.ids.shape[0], options.length - 1, dtype=torch.bool)
    scored[:, options.top_k * options.block_size :] = True
    task = Passkey(lengths=(options.length,), rows=options.passkeys)
    ways = Ways(bench, model, text.ids, haystack=haystack, tasks=[task], scored=scored)
    yield Variant("everything", lambda: ways.figures(None))
    for name, scorer in scorers(selection).items():

        def measure(name: str = name, scorer: KeyBlocks | None = scorer) -> Figures:
            way = attending(model.source, scorer, selection, forecasts)
            return {**quality[name], **ways.figures(way)}

        yield Variant(name, measure, baseline="everything")
