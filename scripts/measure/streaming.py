"""Perplexity along a text many times as long as the window, with sinks and without.

The text is fed in chunks to a transformers model through the small cache of its attention policy,
with positions by cache slot, as a user would generate from it. Prints a table and JSON, and draws
the perplexity of each stretch of the text.

    python scripts/measure/streaming.py MODEL --window 48 --chunk 16 --out streaming
    python scripts/measure/streaming.py MODEL --window 1024 --out streaming --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from torch import Tensor

from compressor.attention.rules.streaming import streaming_policy
from compressor.attention.serve import attach
from compressor.checkpoint.find import locate
from compressor.errors import InputError
from compressor.methods.common.head_plots import curves
from compressor.run.session import choose_device
from compressor.runner.source_model import SourceModel


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder, GGUF file or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNG and JSON files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--times", type=int, default=20, help="length of the text in windows")
    parser.add_argument("--chunk", type=int, default=256, help="tokens fed at once")
    parser.add_argument("--full", action="store_true", help="also attend to everything")
    parser.add_argument("--text", type=Path, help="a text file in place of the bundled one")
    return parser.parse_args()


@torch.no_grad()
def losses(model: Any, ids: Tensor, *, chunk: int, cache: dict[str, Any]) -> tuple[Tensor, int]:
    """Negative log-likelihood of every token but the first [tokens - 1], and the cache's bytes."""
    found = []
    for start in range(0, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        logits = model(ids[None, start:stop], use_cache=True, **cache).logits[0].float()
        found.append(
            torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none")
        )
    (held,) = cache.values()
    size = held.nbytes if hasattr(held, "nbytes") else 0
    return torch.cat(found).cpu(), size


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    device = choose_device(options.device)
    source = locate(options.model, fetch=True).source
    dtype = source.checkpoint.dtype if device.type == "cuda" else torch.float32
    frozen = SourceModel(source, device=device, dtype=dtype)
    length = options.times * options.window + 1
    text = options.text.read_text("utf-8") if options.text else bundled_text("held_out", "fiction")
    encoded = frozen.tokenizer()(text[: 12 * length], add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"][:length]).to(device)
    if len(ids) < length:
        raise InputError(f"the text has {len(ids)} tokens, {length} are needed")
    model = frozen.whole()
    shape = next(unit.attention for unit in source.layout.units if unit.attention)
    every = torch.ones(len(source.layout.units) - 2, shape.kv_heads, dtype=torch.bool)
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    kinds: list[int | None] = [*options.sinks, *([None] if options.full else [])]
    for sinks in kinds:
        policy = streaming_policy(
            source.layout,
            every if sinks is not None else ~every,
            sinks=sinks or 0,
            window=options.window,
            positions="slot" if sinks is not None else "text",
        )
        runtime = attach(model, policy)
        started = time.perf_counter()
        nll, size = losses(model, ids, chunk=options.chunk, cache=runtime.options())
        runtime.detach()
        name = "full attention" if sinks is None else f"{sinks} sinks + {options.window}"
        rows.append({
            "cache": name, "perplexity": _perplexity(nll),
            "first_window": _perplexity(nll[: options.window]),
            "last_window": _perplexity(nll[-options.window :]), "cache_bytes": size,
            "seconds": time.perf_counter() - started,
        })  # fmt: skip
        lines[name] = [
            ((start + options.window) / options.window, _perplexity(part))
            for start, part in zip(
                range(0, len(nll), options.window), nll.split(options.window), strict=True
            )
        ]
        last = rows[-1]
        print(
            f"{name:20} perplexity {last['perplexity']:10.2f}  first window "
            f"{last['first_window']:9.2f}  last {last['last_window']:10.2f}  cache {size:,} bytes  "
            f"{last['seconds']:.1f} s",
            flush=True,
        )
    picture = curves(
        lines, title=f"{source.checkpoint.folder.name}: a text of {options.times} windows",
        x="windows read", y="perplexity of the window", log=True,
    )  # fmt: skip
    if picture is not None:
        (options.out / "streaming.png").write_bytes(picture)
    result = {
        "model": source.checkpoint.folder.name, "device": str(device), "window": options.window,
        "tokens": len(nll), "rows": rows, "curves": lines,
    }  # fmt: skip
    (options.out / "streaming.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(rows))


def _perplexity(nll: Tensor) -> float:
    return math.exp(min(float(nll.double().mean()), 700.0))


if __name__ == "__main__":
    main()
