"""Train forecasts on a checkpoint and measure every way of choosing blocks at one budget.

    python scripts/measure/forecast.py MODEL --length 1024 --block 16 --kernel 8 --stride 4 \
        --local 4 --top-k 12 --json out.json

For the forecast (SparDA), InfLLM-V2's selector, Quest's bounds on the same blocks, and the most
recent blocks: recall of the teacher's blocks and share of attention by layer, perplexity of
held-out targets that lie beyond the budget, and passkey retrieval. Texts are the bundled ones, or
--text for training. Nothing is written into the checkpoint.

The published claims are for bases that were trained with block-sparse attention. A dense model's
attention is spread wider, so its perplexity under a small budget says how sparse the model is
rather than how good a scorer is; recall and share of attention compare the scorers.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import TokenSet
from compressor_kernels.attention.block_windows import WindowRule
from torch import Tensor

from compressor.attention.evaluation import policy_attention, under_masks
from compressor.attention.key_blocks import KeyBlocks, recent_blocks
from compressor.attention.policy import rule_policy
from compressor.checkpoint.records import Records
from compressor.checkpoint.source import Source, open_source
from compressor.evaluate.passkey import Passkey, passkey
from compressor.evaluate.perplexity import evaluate
from compressor.ir.unit import Unit
from compressor.methods.sparda.choice_quality import RECENT, means
from compressor.methods.sparda.choice_record import FORECAST, held_out, record_choices, scorers
from compressor.methods.sparda.method import SparDA
from compressor.methods.sparda.teacher import Teacher
from compressor.methods.sparda.training import Sweep, Training
from compressor.plan.recipe import Calibration
from compressor.run.tokens import calibration_tokens
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.source_model import SourceModel

Attending = Callable[[Unit], AttentionHook | None]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--kernel", type=int, default=32)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--init", type=int, default=1)
    parser.add_argument("--local", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--text", default="bundled/prose", help="training text: a file or folder")
    parser.add_argument(
        "--same-text",
        action="store_true",
        help="measure on the last 15 percent of the training text, not on the other bundled text",
    )
    parser.add_argument("--rows", type=int, default=32, help="training rows")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--initial", choices=["uniform", "queries"], default="queries")
    parser.add_argument("--states", choices=["chosen", "full"], default="chosen")
    parser.add_argument("--held-out", type=int, default=2, help="rows for recall and perplexity")
    parser.add_argument("--passkeys", type=int, default=2, help="passkey rows at each depth")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def texts(options: argparse.Namespace, tokenizer: Any) -> tuple[TokenSet, TokenSet, str]:
    """Training rows, rows to measure on, and a text to hide passkeys in."""
    wanted = {"samples": options.rows, "length": options.length}
    if not options.same_text:
        rows = calibration_tokens(tokenizer, Calibration(data=options.text, **wanted), seed=0)
        text = held_out(tokenizer, rows=options.held_out, length=options.length)
        return rows, text, bundled_text("held_out", "fiction")
    documents = read_documents(options.text, part="calibration")
    whole = "".join(document.text for document in documents)
    cut = int(len(whole) * 0.85)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, part in enumerate((whole[:cut], whole[cut:])):
            path = Path(folder, f"{number}.txt")
            path.write_text(part, "utf-8")
            found.append(Calibration(data=str(path), **wanted))
        last = found[1].model_copy(update={"samples": options.held_out, "sampling": "consecutive"})
        rows = calibration_tokens(tokenizer, found[0], seed=0)
        text = calibration_tokens(tokenizer, last, seed=0)
    return rows, text, whole[cut:]


def train(model: SourceModel, ids: Tensor, training: Training, batch: int) -> dict[str, Tensor]:
    """Forecast tensors by name, rounded as a checkpoint would store them."""
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(
            model,
            ids,
            training,
            seed=0,
            batch=batch,
            scratch=Records(Path(scratch), "measure_forecast"),
            progress=lambda name, done, total: print(f"  trained {name}", flush=True),
        )
        found = sweep.run()
    for number, (first, last) in enumerate(found.losses):
        print(f"  layer {number:2}: loss {first:.4f} -> {last:.4f}")
    blocks = [unit for unit in model.layout.units if unit.kind == "block"]
    named = found.named([unit.attention_path for unit in blocks])
    return {name: tensor.to(torch.bfloat16) for name, tensor in named.items()}


def attending(
    source: Source, selection: KeyBlocks | None, recent: KeyBlocks, forecasts: Any
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


def use(
    source: Source,
    model: SourceModel,
    ways: Mapping[str, Attending | None],
    ids: Tensor,
    haystack: str,
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Perplexity beyond the budget and passkey retrieval in each way of attending."""
    scored = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    scored[:, options.top_k * options.block :] = True
    task = Passkey(lengths=(options.length,), rows=options.passkeys)
    run = {"device": model.device, "dtype": model.dtype, "batch": options.batch}
    found = {}
    for name, way in ways.items():
        result = evaluate(source, ids, scored=scored, attention=way, **run)
        keys = passkey(
            source,
            model.tokenizer(),
            haystack=haystack,
            task=task,
            attention=way,
            **run,
        )
        found[name] = {
            "perplexity": result.perplexity.value,
            "passkey accuracy": keys.accuracy.value,
            "passkey exact": keys.exact.value,
        }
        print(f"  {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found[name].items()), flush=True)
    return found


def show(record: Any, used: Mapping[str, Mapping[str, float]]) -> None:
    names = list(record.to_json()["means"])
    print("\nRecall of the teacher's blocks / share of attention in the chosen ones, by layer")
    print("layer " + "".join(f"{name:>19}" for name in names))
    for layer in dict.fromkeys(q.layer for q in record.layers):
        cells = [f"{q.recall:10.3f} / {q.mass:.3f}" for q in record.layers if q.layer == layer]
        print(f"{layer:5} " + " ".join(f"{cell:>18}" for cell in cells))
    for name, found in means(record.layers).items():
        print(f"mean  {name:10} recall {found['recall']:.3f}, attention {found['mass']:.3f}")
    print("\nUnder each way of attending")
    for name, found in used.items():
        print(f"  {name:10} " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))


def main() -> None:
    options = parse()
    source = open_source(options.model)
    dtype = getattr(torch, options.dtype)
    model = SourceModel(source, device=torch.device(options.device), dtype=dtype)
    settings = SparDA(
        block_size=options.block,
        kernel_size=options.kernel,
        stride=options.stride,
        init_blocks=options.init,
        local_blocks=options.local,
        top_k=options.top_k,
        dense_below=0,
        steps=options.steps,
        rows_per_step=options.rows_per_step,
        learning_rate=options.learning_rate,
        states=options.states,
        initial=options.initial,
    )
    selection = settings.block_choice
    blocks = -(-options.length // options.block)
    print(f"{options.model.name}: {options.top_k} of {blocks} blocks of {options.block} keys")
    tokens, text, haystack = texts(options, model.tokenizer())
    started = time.perf_counter()
    forecasts = train(model, tokens.ids, settings.training, options.batch)
    trained = time.perf_counter()
    print(f"trained in {trained - started:.1f} s")
    teacher = Teacher(selection=selection, fine=WindowRule(kernel_size=2, stride=1))
    record = record_choices(model, teacher, forecasts, text)
    ways: dict[str, Attending | None] = {"full": None}
    ways |= {
        name: attending(source, way, selection, forecasts)
        for name, way in scorers(selection).items()
    }
    used = use(source, model, ways, text.ids, haystack, options)
    show(record, used)
    print(f"\ntraining {trained - started:.1f} s, all {time.perf_counter() - started:.1f} s")
    if options.json:
        found = {
            "options": {k: str(v) for k, v in vars(options).items()},
            "means": means(record.layers),
            "layers": [asdict(quality) for quality in record.layers],
            "used": used,
            "seconds": trained - started,
        }
        options.json.write_text(json.dumps(found, indent=1))
    assert {FORECAST, RECENT} <= set(used)


if __name__ == "__main__":
    main()
