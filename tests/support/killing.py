"""Runs a recipe in child processes and kills them at random moments until one finishes.

The parent runs the recipe once and forks, so a child costs milliseconds to start.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compressor.plan.recipe import load_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare


def child(recipe: Path, output: str) -> None:
    torch.set_num_threads(1)
    loaded = load_recipe(recipe, output=output)
    compile_checkpoint(prepare(loaded, device=choose_device("cpu")))


def start(recipe: Path, output: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child(recipe, output)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(9)
    return pid


def kill_at_random(recipe_path: str, output: str, seed: int) -> dict[str, Any]:
    """How many children were killed, and after how many committed units."""
    recipe = Path(recipe_path)
    rng = random.Random(seed)
    # Here and not in a child, so that the children find everything imported.
    child(recipe, f"{output}-whole")
    began = time.monotonic()
    _, status = os.waitpid(start(recipe, f"{output}-again"), 0)
    assert status == 0, status
    whole = time.monotonic() - began
    kills, committed = 0, []
    while True:
        pid = start(recipe, output)
        # Short lives first, so that many deaths come before the run gets through.
        time.sleep(rng.uniform(0.02, 0.1 + 0.08 * kills) * whole)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
        kills += 1
        committed.append(len(list((Path(output) / ".compress-work" / "units").glob("*.json"))))
    return {"kills": kills, "committed": committed}
