"""Fine-tune a small checkpoint on text of one style, for measuring deltas on a real pair.

    python scripts/fetch_smollm2.py
    python scripts/finetune_smollm2.py ~/.cache/compressor/smollm2-135m FINE moby.txt \
        --without 390000:470000

Every weight is trained by AdamW on rows of consecutive tokens of the files, in the order of a
seeded shuffle, with a cosine after a short warm-up; in float32, on a GPU under bfloat16 autocast.
The result has the base's dtype. `--without` leaves out characters of the first file, which are to
judge the result. So that it is no worse than its base on text it has not seen, the last rows of the
rest are kept for validation: the weights of the step with the lowest loss on them are written, and
training ends where that loss has stopped to fall.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint.reader import open_checkpoint


def rows(options: argparse.Namespace) -> Tensor:
    """Token ids [rows, length] of all texts."""
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    first, *rest = (path.read_text("utf-8") for path in options.texts)
    if options.without:
        start, stop = (int(part) for part in options.without.split(":"))
        first = first[:start] + first[stop:]
    pieces = [tokenizer(t, add_special_tokens=False, verbose=False) for t in (first, *rest)]
    ids = [i for piece in pieces for i in piece.input_ids]
    count = len(ids) // options.length
    return torch.tensor(ids[: count * options.length]).view(count, options.length)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean loss of a token."""
    ids = batch.to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


@torch.no_grad()
def validation_loss(model: Any, data: Tensor, batch: int) -> float:
    """Over rows the model is not trained on."""
    return sum(float(loss_of(model, part)) * len(part) for part in data.split(batch)) / len(data)


def train(options: argparse.Namespace) -> dict[str, float]:
    """Train, and write the weights of the step whose loss on the rows that are kept for validation
    was lowest: that loss before and after, and the step."""
    model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model = model.to(options.device).eval()  # no dropout: the shortest way to a fine-tune
    data, steps, batch = rows(options), options.steps, options.batch
    kept = max(1, round(len(data) * options.validation))
    if kept >= len(data):
        raise SystemExit(f"{len(data)} rows are too few to train and to validate on")
    data, unseen = data[:-kept], data[-kept:]
    print(f"{len(data)} rows to train on", flush=True)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / warmup) * (1 + math.cos(math.pi * n / steps)) / 2,
    )
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    best = before = validation_loss(model, unseen, batch)
    best_step, weights = 0, [p.detach().clone() for p in trained]
    for step in range(1, steps + 1):
        while len(order) < batch:
            order += torch.randperm(len(data), generator=generator).tolist()
        chosen, order = data[order[:batch]], order[batch:]
        optimizer.zero_grad()
        loss = loss_of(model, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % options.every and step < steps:
            continue
        found = validation_loss(model, unseen, batch)
        print(f"step {step}  loss {float(loss.detach()):.4f}  validation {found:.4f}", flush=True)
        if found < best:
            best, best_step = found, step
            weights = [p.detach().clone() for p in trained]
        elif step - best_step >= options.patience * options.every:
            break
    if not best_step:
        raise SystemExit("no step is better than the base on unseen rows: try a lower --lr")
    with torch.no_grad():
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.copy_(weight)
    model.to(open_checkpoint(options.base).dtype).save_pretrained(options.fine)
    for path in options.base.glob("*token*"):
        shutil.copyfile(path, options.fine / path.name)
    return {"before": before, "after": best, "step": best_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", type=Path)
    add("fine", type=Path, help="folder to write; it must be new")
    add("texts", type=Path, nargs="+")
    add("--without", help="characters of the first text to leave out, FROM:TO")
    add("--steps", type=int, default=240, help="at most")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=512)
    add("--lr", type=float, default=5e-5)
    add("--validation", type=float, default=0.06, help="share of the rows, the last")
    add("--every", type=int, default=20, help="steps between two validations")
    add("--patience", type=int, default=3, help="validations without a better one")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.fine.exists():
        parser.error(f"{options.fine} is already there")
    started = time.perf_counter()
    found = train(options)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
