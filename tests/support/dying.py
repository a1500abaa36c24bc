"""Runs a recipe in children that die at their n-th durable step, for n from a first one in strides.

A durable step is what a crash can fall between: a rename, a sync, a positioned write, a folder's
removal. For each n one child dies there without any clean-up, and a second one is given the same
command.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.plan.recipe import load_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare

STEPS = ("replace", "fsync", "pwritev")


def counting(limit: int, count: list[int]) -> list[Callable[[], None]]:
    """Make the process die before its `limit`-th durable step (never, where that is 0).

    Returns what undoes it.
    """
    undo = []

    def wrap(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == limit:
                os._exit(7)
            return real(*args, **kwargs)

        setattr(owner, name, step)
        undo.append(lambda: setattr(owner, name, real))

    for name in STEPS:
        wrap(os, name)
    wrap(shutil, "rmtree")
    return undo


def whole_run(recipe: Path, output: str, limit: int = 0) -> int:
    """Run the recipe; how many durable steps it took."""
    count = [0]
    undo = counting(limit, count)
    loaded = load_recipe(recipe, output=output)
    compile_checkpoint(prepare(loaded, device=choose_device("cpu")))
    for restore in undo:
        restore()
    return count[0]


def run(recipe: Path, output: str, limit: int) -> int:
    """The exit status of a child."""
    pid = os.fork()
    if pid == 0:
        try:
            whole_run(recipe, output, limit)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def die_at_steps(recipe_path: str, output: str, first: int, stride: int) -> dict[str, Any]:
    """The steps of a whole run, and at which ones children died."""
    torch.set_num_threads(1)
    recipe = Path(recipe_path)
    # Here and not in a child, so that the children find everything imported.
    steps = whole_run(recipe, output)
    whole = contents(output)
    died = []
    for limit in range(first, steps + 1, stride):
        again = f"{output}-{limit}"
        # Writes go on in threads, so a step's number may be another's in another run.
        status = run(recipe, again, limit)
        assert status in (0, 7), (limit, status)
        if status == 7:
            died.append(limit)
            finished = (Path(again) / "manifest.json").exists()
            if finished:
                assert set(whole) <= {path.name for path in Path(again).iterdir()}, limit
        assert run(recipe, again, 0) == 0, limit
        assert contents(again) == whole, limit
        shutil.rmtree(again)
    return {"steps": steps, "died": died}
