"""One block of each large model's shape by AWQ on the GPU: seconds, and memory beside the planned.

    python scripts/bench/blocks.py SCRATCH [--shapes llama-3-70b deepseek-v3] [--device-memory 8GB]
           [--uneven]
    python scripts/bench/blocks.py SCRATCH --tiny --device cpu

Weights are random, drawn once and repeated, and written to SCRATCH as a checkpoint with three
blocks of the shape and 512 tokens of vocabulary; the second block is what counts, which makes the
inputs of the third. Of a block above 16 GB it is the third itself, which makes no inputs: memory
for reading is taken anew for the first two, and takes longer than reading. Where main memory does
not hold eight such blocks there is one, and all that is in its time. 128 × 512 tokens, W4
asymmetric, groups of 128, scales and clipping searched; each run is a process of its own, forked
after the imports. `read_s` is what reading and hashing the block took, while the one before was
worked on, and `made_s` what writing the weights took: SCRATCH in memory (/dev/shm) is quickest. The
whole model is its blocks times the seconds of one: no embedding, no head, no start. A line of JSON
each, then a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_random_model import SHAPES, block, smaller, write

from compressor.errors import CompressError
from compressor.ir.unit import Unit
from compressor.plan.recipe import make_recipe, parse_size
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.settings import UnitDone
from compressor.run.source_content import SourceContent

LARGE = 16e9
STOCK = 2**26 + 1
"""Random weights that are drawn; all tensors are pieces of them, one after the other."""
MODELS = ("llama-3-70b", "llama-3-405b", "mixtral-8x22b", "qwen3-235b-a22b", "deepseek-v3")


def run(folder: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run over it."""
    size = 32 if options.tiny else 128
    awq = {"bits": 4, "group_size": size, "symmetric": False}
    rows = {"samples": 4, "length": 64} if options.tiny else {"samples": 128, "length": 512}
    recipe = {
        "model": str(folder),
        "output": str(output),
        "passes": [{"awq": awq}],
        "calibration": {"data": "bundled/prose", **rows},
        "verify": False,
        "report": False,
    }
    device = choose_device(options.device)
    prepared = prepare(make_recipe(recipe), device=device, device_memory=options.device_memory)
    counted = len(prepared.plan.layout.blocks) if options.large else 2
    reads: dict[int, float] = {}
    read = SourceContent.read

    def timed(self: SourceContent, index: int, *, pin: bool = False) -> Unit:
        began = time.perf_counter()
        found = read(self, index, pin=pin)
        reads[index] = time.perf_counter() - began
        return found

    SourceContent.read = timed  # type: ignore[method-assign]  # in this process, which ends here
    watched = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def done(unit: UnitDone) -> None:
        if options.profile and unit.index == counted - 1:
            watched.start()
        if options.profile and unit.index == counted:
            watched.stop()

    made = compile_checkpoint(prepared, on_unit=done)
    block = made.units[counted]
    if options.profile:
        by = "self_cpu_time_total" if device.type == "cpu" else "self_cuda_time_total"
        table = watched.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
        with options.profile.open("a") as file:
            file.write(f"{folder.name}\n{table}\n")
    planned = prepared.estimates
    return {
        "block_s": round(block.seconds, 2),
        "read_s": round(reads[counted], 2),
        "device_gb": round(max(unit.peak_device for unit in made.units) / 1e9, 2),
        "planned_device_gb": round(planned.device_bytes / 1e9, 2),
        "host_gb": round(max(unit.peak_rss for unit in made.units) / 1e9, 2),
        "planned_host_gb": round(planned.host_bytes / 1e9, 2),
    }


def apart(work: Any, *args: Any) -> Any:
    """What a function gives in a process of its own, or why it gives nothing."""

    def tell() -> None:
        try:
            there.send(work(*args))
        except (CompressError, RuntimeError, ValueError) as error:
            there.send(f"{type(error).__name__}: {error}")
        there.close()
        os._exit(0)

    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=tell)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return "the process died"
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="folder for models and outputs")
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", type=parse_size, help="as for compress run")
    parser.add_argument(
        "--profile", type=Path, help="add a table of the last block's kernels to it"
    )
    parser.add_argument(
        "--uneven", action="store_true", help="channels of unlike sizes, as trained models have"
    )
    parser.add_argument("--tiny", action="store_true", help="small sides, to try the script")
    options = parser.parse_args()
    rows = {}
    for name in options.shapes:
        config = smaller(SHAPES[name]) if options.tiny else SHAPES[name]
        layers = config["num_hidden_layers"]
        if dense := config.get("first_k_dense_replace"):
            config, layers = {**config, "first_k_dense_replace": 0}, layers - dense
        nbytes = 2 * sum(torch.Size(shape).numel() for shape in block(config, 0).values())
        folder, output = options.scratch / name, options.scratch / "out"
        options.large = nbytes > LARGE
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        count = 1 if options.large and memory < 8 * nbytes else 3
        began = time.perf_counter()
        made = apart(
            partial(
                write,
                folder,
                config,
                layers=count,
                device=options.device,
                repeated=STOCK,
                uneven=options.uneven,
            )
        )
        made_s = round(time.perf_counter() - began, 1)
        row = {"why": made} if made else apart(run, folder, output, options)
        if isinstance(row, dict) and "block_s" in row:
            row["model_s"] = round(row["block_s"] * layers)
            rows[name] = row
        print(
            json.dumps(
                {"what": name, "block_gb": round(nbytes / 1e9, 2), "made_s": made_s, "found": row}
            ),
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
    for number, (name, row) in enumerate(rows.items()):
        if number == 0:
            print(f"\n| one block of | {' | '.join(row)} |\n|{'---|' * (len(row) + 1)}")
        print(f"| {name} | {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
