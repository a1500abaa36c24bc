"""Fine-tune a small checkpoint on text of one style, for measuring deltas on a real pair.

    python scripts/fetch_smollm2.py
    python scripts/finetune_smollm2.py ~/.cache/compressor/smollm2-135m FINE moby.txt \
        --without 390000:470000

Every weight is trained by AdamW on rows of consecutive tokens of the files, in the order of a
seeded shuffle, with a cosine after a short warm-up; in float32, on a GPU under bfloat16 autocast.
The result has the base's dtype. `--without` leaves out characters of the first file, to be held
out.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint import open_checkpoint


def rows(options: argparse.Namespace) -> Tensor:
    """Token ids [rows, length] of all texts."""
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    ids: list[int] = []
    for number, path in enumerate(options.texts):
        text = path.read_text("utf-8")
        if number == 0 and options.without:
            start, stop = (int(part) for part in options.without.split(":"))
            text = text[:start] + text[stop:]
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = len(ids) // options.length
    if count == 0:
        raise SystemExit(f"the texts give {len(ids)} tokens, a row takes {options.length}")
    return torch.tensor(ids[: count * options.length]).view(count, options.length)


def train(options: argparse.Namespace) -> list[float]:
    """Train, save, and return the loss of each step."""
    device = torch.device(options.device)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).to(device)
    model.train()
    data = rows(options)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    order: list[int] = []
    losses: list[float] = []
    warmup = max(1, options.steps // 20)
    for step in range(options.steps):
        while len(order) < options.batch:
            order += torch.randperm(len(data), generator=generator).tolist()
        batch, order = data[order[: options.batch]].to(device), order[options.batch :]
        rise = min(1.0, (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rise * (1 + math.cos(math.pi * step / options.steps)) / 2
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            print(f"step {step + 1} of {options.steps}  loss {losses[-1]:.4f}", flush=True)
    model.to(open_checkpoint(options.base).dtype).save_pretrained(options.fine)
    for path in options.base.glob("*token*"):
        shutil.copyfile(path, options.fine / path.name)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("fine", type=Path, help="folder to write; it must be new")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--without", help="characters of the first text to leave out, FROM:TO")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.fine.exists():
        parser.error(f"{options.fine} is already there")
    started = time.perf_counter()
    losses = train(options)
    found = {"first": losses[0], "last": losses[-1], "seconds": time.perf_counter() - started}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
