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
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint.reader import open_checkpoint

VALIDATION = 0.06
"""Share of the rows, the last, that no step sees."""
EVERY, PATIENCE = 20, 3
"""Steps between two validations; validations without a better one after which training ends."""


def rows(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    """Token ids [rows, length] of all texts."""
    first, *rest = (path.read_text("utf-8") for path in options.texts)
    if options.without:
        start, stop = (int(part) for part in options.without.split(":"))
        first = first[:start] + first[stop:]
    pieces = [tokenizer(t, add_special_tokens=False, verbose=False) for t in (first, *rest)]
    ids = torch.tensor([i for piece in pieces for i in piece.input_ids])
    return ids[: len(ids) // options.length * options.length].view(-1, options.length)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean loss of a token."""
    ids = batch.to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


def train(model: Any, data: Tensor, *, steps: int, batch: int, lr: float) -> None:
    """Leave the model with the weights whose loss on the last rows was lowest."""
    kept = max(1, round(len(data) * VALIDATION))
    if kept >= len(data):
        raise SystemExit(f"{len(data)} rows are too few to train and to validate on")
    data, unseen = data[:-kept], data[-kept:]
    warmup, generator = max(1, steps // 20), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / warmup) * (1 + math.cos(math.pi * n / steps)) / 2,
    )
    order: list[int] = []
    best, best_step, weights = math.inf, 0, {}
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                parts = [float(loss_of(model, part)) * len(part) for part in unseen.split(batch)]
            found = sum(parts) / len(unseen)
            print(f"step {step}  validation {found:.4f}", flush=True)
            if found < best:
                best, best_step = found, step
                weights = {name: value.clone() for name, value in model.state_dict().items()}
            elif step - best_step >= PATIENCE * EVERY:
                break
        while len(order) < batch:
            order += torch.randperm(len(data), generator=generator).tolist()
        chosen, order = data[order[:batch]], order[batch:]
        optimizer.zero_grad()
        loss_of(model, chosen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if not best_step:
        raise SystemExit("no step is better than the base on unseen rows: try a lower --lr")
    model.load_state_dict(weights)


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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.fine.exists():
        parser.error(f"{options.fine} is already there")
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model = model.to(options.device).eval()  # no dropout: the shortest way to a fine-tune
    data = rows(options, tokenizer)
    train(model, data, steps=options.steps, batch=options.batch, lr=options.lr)
    model.to(open_checkpoint(options.base).dtype).save_pretrained(options.fine)
    for path in options.base.glob("*token*"):
        shutil.copyfile(path, options.fine / path.name)


if __name__ == "__main__":
    main()
