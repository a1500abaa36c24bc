"""Seconds for each block of learned rounding: ours, and AutoRound's in the same process after it.

    python scripts/make_random_model.py MODEL --shape 7b --layers 8
    python scripts/bench/peer_autoround.py MODEL --presets fast good --launched

Both round the same model to 4 bits, symmetric, with the same calibration rows: `reconstruct` from
disk to disk, then AutoRound (`pip install auto-round`, its 200 steps of 8 rows) in memory. With
`--launched` ours run once more after that with the kernels of their steps launched one by one, in
place of CUDA graphs, and whether both wrote the same bytes is said; `graphs` counts recordings. A
block's time is that from the end of the one before it to its own end, so that the first, which has
compilation in it, has none. A line of JSON each, with the median and all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
import itertools

from peers import run_autoround

from compressor.plan.recipe import Recipe, make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.tokens import calibration_tokens
from compressor.runner.recorded import Recorder, Work
from compressor.runner.tokenizer import load_tokenizer


class Ends(logging.Handler):
    """When AutoRound says that a block is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "layers in the block" in record.getMessage():
            self.times.append(time.perf_counter())


def say(what: str, ends: list[float], began: float, **about: object) -> None:
    blocks = [b - a for a, b in itertools.pairwise(ends)]
    row = {
        "what": what,
        "block_s": round(statistics.median(blocks), 3) if blocks else None,
        "blocks_s": [round(seconds, 3) for seconds in blocks],
        "first_ended_s": round(ends[0] - began, 2),
        "whole_s": round(time.perf_counter() - began, 2),
        **about,
    }
    print(json.dumps(row), flush=True)


@contextmanager
def recording(*, allowed: bool) -> Iterator[Counter[str]]:
    """What came of recordings, for the length of a `with`; there are none unless allowed."""
    found: Counter[str] = Counter()
    record = Recorder.record

    def counted(self: Recorder, work: Work) -> tuple[torch.cuda.CUDAGraph, Sequence[torch.Tensor]]:
        try:
            if not allowed:
                raise RuntimeError("launched one by one")
            made = record(self, work)
        except RuntimeError as error:
            found[str(error).partition("\n")[0]] += 1
            raise
        found["recorded"] += 1
        return made

    Recorder.record = counted
    try:
        yield found
    finally:
        Recorder.record = record


def recipe_of(options: argparse.Namespace, preset: str, output: Path) -> Recipe:
    grid = {"bits": 4, "group_size": options.group_size}
    return make_recipe(
        {
            "model": str(options.model),
            "output": str(output),
            "passes": [{"reconstruct": {**grid, "preset": preset}}],
            "calibration": {
                "data": "bundled/prose",
                "samples": options.samples,
                "length": options.length,
            },
            "verify": False,
            "report": False,
        }
    )


def ours(
    options: argparse.Namespace, preset: str, scratch: Path, device: torch.device, *, graphs: bool
) -> Mapping[str, str]:
    """Rounds the model, says how long it took, and gives the hashes of what was written."""
    output = scratch / (preset if graphs else f"{preset}-launched")
    ends: list[float] = []
    began = time.perf_counter()
    session = prepare(recipe_of(options, preset, output), device=device)
    with recording(allowed=graphs) as found:
        compile_checkpoint(session, on_unit=lambda unit: ends.append(time.perf_counter()))
    # Embedding and head are units as well.
    say(f"reconstruct, {output.name}", ends[1:-1], began, graphs=dict(found))
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(output.glob("*.safetensors"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", nargs="*", default=["fast"], choices=["fast", "good", "best"])
    parser.add_argument("--launched", action="store_true", help="without CUDA graphs, too")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        work = partial(ours, options, scratch=Path(scratch), device=device)
        made = {preset: work(preset, graphs=True) for preset in options.presets}
        recipe = recipe_of(options, "fast", Path(scratch) / "unused")
        tokenizer = load_tokenizer(options.model)
        rows = calibration_tokens(tokenizer, recipe.calibration, seed=recipe.seed).ids
        heard = Ends()
        logging.getLogger("autoround").addHandler(heard)
        began = time.perf_counter()
        theirs = Path(scratch) / "theirs"
        grid = {"bits": 4, "group_size": options.group_size}
        run_autoround(options.model, rows, theirs, grid=grid, steps=options.steps, device=device)
        say(f"AutoRound, {options.steps} steps", heard.times, began)
        for preset, wanted in made.items() if options.launched else ():
            again = work(preset, graphs=False)
            print(json.dumps({"preset": preset, "same_bytes": again == wanted}), flush=True)


if __name__ == "__main__":
    main()
