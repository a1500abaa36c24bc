"""Perplexity along a text many times as long as the window, with sinks and without.

The text is fed in chunks to a transformers model through the small cache of its attention policy,
with positions by cache slot, as a user would generate from it.

    python scripts/measure/run.py streaming MODEL --window 48 --chunk 16
    python scripts/measure/run.py streaming MODEL --window 1024 --device cuda
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from torch import Tensor
from variant import Bench, Figures, Variant
from ways import token_rows, whole_model

from compressor.attention.rules.streaming import streaming_policy
from compressor.attention.serve import attach


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, GGUF file or Hub id")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--times", type=int, default=20, help="length of the text in windows")
    parser.add_argument("--chunk", type=int, default=256, help="tokens fed at once")
    parser.add_argument("--full", action="store_true", help="also attend to everything")
    parser.add_argument("--text", type=Path, help="a text file in place of the bundled one")


@torch.no_grad()
def losses(model: Any, ids: Tensor, *, chunk: int, cache: dict[str, Any]) -> Tensor:
    """Negative log-likelihood of every token but the first [tokens - 1]."""
    found = []
    for start in range(0, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        logits = model(ids[None, start:stop], use_cache=True, **cache).logits[0].float()
        wanted = ids[start + 1 : stop + 1]
        found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(found).cpu()


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    frozen = whole_model(bench, options.model)
    text = options.text.read_text("utf-8") if options.text else bundled_text("held_out", "fiction")
    ids = token_rows(frozen, text, 1, options.times * options.window + 1)[0].to(bench.device)
    model, layout = frozen.whole(), frozen.source.layout
    shape = next(unit.attention for unit in layout.units if unit.attention)
    streaming = torch.ones(len(layout.blocks), shape.kv_heads, dtype=torch.bool)

    def measure(sinks: int | None) -> Figures:
        policy = streaming_policy(
            layout,
            streaming if sinks is not None else ~streaming,
            sinks=sinks or 0,
            window=options.window,
            positions="slot" if sinks is not None else "text",
        )
        runtime, started = attach(model, policy), time.perf_counter()
        cache = runtime.options()
        nll = losses(model, ids, chunk=options.chunk, cache=cache)
        runtime.detach()
        parts = [float(part.double().mean()) for part in nll.split(options.window)]
        (held,) = cache.values()
        return {
            "nll": parts,
            "first window": math.exp(min(parts[0], 700)),
            "last window": math.exp(min(parts[-1], 700)),
            "cache bytes": getattr(held, "nbytes", 0),
            "seconds": time.perf_counter() - started,
        }

    for sinks in [*options.sinks, *([None] if options.full else [])]:
        name = "full attention" if sinks is None else f"{sinks} sinks + {options.window}"
        yield Variant(name, lambda sinks=sinks: measure(sinks))
