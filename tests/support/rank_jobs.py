"""Runs recipes on several ranks, each a fork of a process that has imported everything.

python rank_jobs.py JOBS.json   # {"folder": ..., "worlds": [...], "batch": ..., "recipes": {...}}
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.plan.recipe import make_recipe
from compressor.ranks.join import joined
from compressor.ranks.ranks import Ranks
from compressor.run.session import compile_checkpoint, prepare

CPU = torch.device("cpu")


def run(recipe: dict[str, Any], output: Path, batch: int, ranks: Ranks) -> None:
    prepared = prepare(make_recipe({**recipe, "output": str(output)}), device=CPU)
    compile_checkpoint(replace(prepared, batch=batch), ranks=ranks)


def rank(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    folder = Path(jobs["folder"]) / str(world)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {"RANK": str(number), "WORLD_SIZE": str(world), **meeting}
    with joined(CPU, place) as ranks:
        for name, recipe in jobs["recipes"].items():
            started = time.perf_counter()
            run(recipe, folder / name, jobs["batch"], ranks)
            if number == 0:
                print(f"{world} {name} {time.perf_counter() - started:.2f} s", flush=True)


def main() -> None:
    os.fsync = lambda handle: None
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for world in jobs["worlds"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(world):
            if (child := os.fork()) == 0:
                try:
                    rank(jobs, number, world, port)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(ended):
            sys.exit(f"{world} ranks ended with {ended}")


if __name__ == "__main__":
    main()
