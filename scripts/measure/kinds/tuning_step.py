"""Time and memory of one step of tuning: the full model, or an emulator with frozen blocks between
its first and last ones, each with all weights of the tuned blocks or with LoRA of rank 4 in them.

    python scripts/measure/run.py tuning_step --shape llama-7b --pads 2 2 --keep 8

Weights are random, in bfloat16, and so are AdamW's moments; attention is fused, nothing is
recomputed. Offsite-Tuning (arXiv 2302.04870) tells of 6.5 times the tokens a second in 5.6 times
less memory for GPT-2 XL with LoRA, pads of 2 and 16 of 44 blocks, against tuning all of it. Rows
with LoRA need peft.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from variant import Bench, Figures, Variant

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "gpt2-xl": {
        "model_type": "gpt2",
        "n_layer": 48,
        "n_embd": 1600,
        "n_head": 25,
        "vocab_size": 50257,
    },
    "tiny": {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--pads", type=int, nargs=2, default=[2, 2])
    parser.add_argument("--keep", type=int, default=8, help="blocks of the middle")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeat", type=int, default=8, help="steps that are timed, after two")


@dataclass(frozen=True)
class Way:
    """What is tuned of which model: `blocks` of it in all, those at `pads` or all (None)."""

    blocks: int
    pads: tuple[int, int] | None
    lora: bool


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    shape = SHAPES[options.shape]
    whole = shape.get("num_hidden_layers") or shape["n_layer"]
    pads = tuple(options.pads)
    short = sum(pads) + options.keep
    for name, way in {
        "full model": Way(whole, None, lora=False),
        "full model, LoRA": Way(whole, None, lora=True),
        "emulator": Way(short, pads, lora=False),
        "emulator, LoRA": Way(short, pads, lora=True),
    }.items():
        yield Variant(name, lambda way=way: step(bench, shape, way), vars(options))


def step(bench: Bench, shape: dict[str, Any], way: Way) -> Figures:
    """Tokens a second and the most memory that was allocated."""
    options, device = bench.options, bench.device
    values = dict(shape)
    count = "n_layer" if "n_layer" in values else "num_hidden_layers"
    config = AutoConfig.for_model(values.pop("model_type"), **{**values, count: way.blocks})
    torch.manual_seed(0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if way.lora:
        from peft import LoraConfig, get_peft_model

        linears = {
            path.rpartition(".")[2]
            for path, module in blocks_of(model).named_modules()
            if getattr(module, "weight", torch.empty(0)).dim() == 2
        }
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=32,
            target_modules=sorted(linears),
            layers_to_transform=own(way) if way.pads else None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    elif way.pads:
        model.requires_grad_(False)
        for block in own(way):
            blocks_of(model)[block].requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(0, 250, (options.batch, options.length), device=device)
    seconds = []
    for _ in range(2 + options.repeat):
        started = now(device)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        seconds.append(now(device) - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    middle = sorted(seconds[2:])[len(seconds[2:]) // 2]
    found: Figures = {
        "tuned parameters": float(sum(p.numel() for p in trained)),
        "step ms": middle * 1e3,
        "tokens/s": ids.numel() / middle,
        "peak MiB": peak / 2**20,
    }
    del model, optimizer, trained
    return found


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """A model's blocks."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def own(way: Way) -> list[int]:
    """Numbers of the blocks at both ends."""
    assert way.pads is not None
    return [*range(way.pads[0]), *range(way.blocks - way.pads[1], way.blocks)]


def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
