"""Runs recipes on several ranks, each a fork of a process that has imported everything.

python rank_jobs.py JOBS.json   # {"folder": ..., "worlds": {"2": [...]}, "batch": ..., ...}
"""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib import pyplot  # noqa: F401  # before the forks, as the two below
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mixtral import modeling_mixtral  # noqa: F401

from compressor.checkpoint.shards import ShardWriter
from compressor.checkpoint.workspace import owned
from compressor.errors import CompressError
from compressor.methods.awq import method as awq
from compressor.methods.common import second_order
from compressor.plan.recipe import make_recipe
from compressor.ranks.join import joined
from compressor.ranks.ranks import Ranks
from compressor.run.judge import Verdict, judge
from compressor.run.loop import Loop
from compressor.run.session import compile_checkpoint, prepare
from compressor.run.settings import UnitDone
from compressor.runner import spread
from compressor.runner.block_runner import Block
from compressor.runner.pieces import Pieces
from compressor.verify.verify import verify

CPU = torch.device("cpu")
IN_ORDER = Pieces._in_order
LOAD = Block.load


def run(
    recipe: dict[str, Any], output: Path, batch: int, ranks: Ranks, memory: int | None = None
) -> None:
    made = make_recipe({**recipe, "output": str(output)})
    prepared = prepare(made, device=CPU, device_memory=memory, world=ranks.world)
    prepared = replace(prepared, batch=batch)
    units: list[str] = []
    ran = written = 0

    def counted(self: Pieces, work: Any) -> Any:
        nonlocal ran
        ran += 1
        return IN_ORDER(self, work)

    write = ShardWriter.write

    def wrote(self: ShardWriter, data: Mapping[str, memoryview]) -> dict[str, str]:
        nonlocal written
        written += sum(part.nbytes for part in data.values())
        return write(self, data)

    held: set[int] = set()

    def loads(self: Block, tensors: Any) -> None:
        LOAD(self, tensors)
        held.update(self.runner.names.held(self.unit, tensors))

    with (
        patch.dict(second_order.HALVED, cpu=2**12),
        patch.object(Block, "load", loads),
        patch.object(Pieces, "_in_order", counted),
        patch.object(ShardWriter, "write", wrote),
    ):
        compiled = compile_checkpoint(
            prepared, ranks=ranks, on_unit=lambda done: units.append(done.name)
        )
    (output / f"ran.{ranks.rank}").write_text(str(ran))
    (output / f"wrote.{ranks.rank}").write_text(str(written))
    (output / f"held.{ranks.rank}.json").write_text(json.dumps(sorted(held)))
    if recipe["verify"]:
        (output / f"units.{ranks.rank}.json").write_text(json.dumps(units))
        verdict = judge(prepared, compiled, ranks=ranks)
        (output / f"verdict.{ranks.rank}.json").write_text(json.dumps(_timeless(verdict)))


def _timeless(verdict: Verdict) -> dict[str, Any]:
    found = verdict.to_json()
    if found["evaluate"]:
        del found["evaluate"]["seconds"]
    return {key: value for key, value in found.items() if key not in ("ok", "gate")}


def place_of_rank(number: int, world: int, port: int) -> dict[str, str]:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(number), "WORLD_SIZE": str(world), **meeting}


def finish(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        run(jobs["faulty"], Path(jobs["output"]), jobs["batch"], ranks)


def rank(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    folder = Path(jobs["folder"]) / str(world)
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        for name in jobs["worlds"][str(world)]:
            started = time.perf_counter()
            memory = jobs["memory"].get(name)
            run(jobs["recipes"][name], folder / name, jobs["batch"], ranks, memory)
            if number == 0:
                print(f"{world} {name} {time.perf_counter() - started:.2f} s", flush=True)


def damage(folder: Path) -> None:
    """A norm of the first block that is no number, and a shape of the second that is wrong."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layers.0.input_layernorm.weight"):
                tensor[0] = torch.nan
            if name.endswith("layers.1.self_attn.k_proj.weight_shape"):
                tensor[0] += 3
        save_file(tensors, path, {"format": "pt"})


def damaged(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """Verify what has been damaged."""
    folder = Path(jobs["folder"])
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        model = Path(jobs["recipes"]["judged"]["model"])
        report = verify(folder / "damaged", against=model, device=CPU, ranks=ranks)
        (folder / f"damaged.{world}.{number}.json").write_text(json.dumps(report.to_json()))


def kill_one(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank dies after the first block."""
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        prepared = prepare(make_recipe({**jobs["faulty"], "output": jobs["output"]}), device=CPU)

        def done(unit: UnitDone) -> None:
            if unit.index == 1 and number == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        compile_checkpoint(replace(prepared, batch=jobs["batch"]), ranks=ranks, on_unit=done)


def short_of_memory(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank's memory does not do, in the middle of a block."""
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        prepared = prepare(make_recipe({**jobs["faulty"], "output": jobs["output"]}), device=CPU)

        def search(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        if number == world - 1:
            awq.search_scales_reference = search
        compile_checkpoint(replace(prepared, batch=jobs["batch"]), ranks=ranks)


def short_while_learning(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank's memory does not do for gradients of its rows."""

    def work(self: Pieces, work: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    if number == world - 1:
        Pieces._in_order = work  # type: ignore[method-assign]
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        recipe = {**jobs["recipes"]["gates"], "output": jobs["output"] + "-short"}
        prepared = prepare(make_recipe(recipe), device=CPU)
        compile_checkpoint(replace(prepared, batch=jobs["batch"]), ranks=ranks)


def short_second_time(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank's memory does not do for two rows that go on from what experts made."""
    _short_on(more_than=1, where=number == world - 1)
    _spread(jobs, number, world, port, "short")


def short_for_one_row(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """Nor for one."""
    _short_on(more_than=0, where=number == world - 1)
    _spread(jobs, number, world, port, "shorter")


def _short_on(*, more_than: int, where: bool) -> None:
    first_time, forward, going_on = spread._first_time, Block.forward, False

    def reached(*args: Any) -> Any:
        nonlocal going_on
        going_on = False
        found = first_time(*args)
        going_on = True
        return found

    def runs(self: Block, hidden: torch.Tensor, side: Any = None) -> torch.Tensor:
        if going_on and hidden.shape[0] > more_than:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, hidden, side)

    if where:
        spread._first_time = reached
        Block.forward = runs  # type: ignore[method-assign]


def _spread(jobs: dict[str, Any], number: int, world: int, port: int, name: str) -> None:
    """A run whose experts are spread, and the batches that it ran in."""
    batches: list[list[int]] = []
    following = Loop._next_inputs

    def noted(self: Loop, *args: Any) -> dict[str, list[int]]:
        made = following(self, *args)
        batches.append(made["batches"])
        return made

    Loop._next_inputs = noted  # type: ignore[method-assign]
    (recipe,) = jobs["memory"]
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        output = Path(jobs["folder"]) / name
        run(jobs["recipes"][recipe], output, jobs["batch"], ranks, jobs["memory"][recipe])
    (output / f"batches.{number}.json").write_text(json.dumps(batches))


def full_disk(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank's disk does not take its part of the second unit."""
    fail(ShardWriter, "write", after=1, where=number == world - 1)
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        run(jobs["faulty"], Path(jobs["output"] + "-full"), jobs["batch"], ranks)


def unsynced(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The leading rank cannot sync what all have written."""
    fail(ShardWriter, "commit", after=0, where=number == 0)
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        run(jobs["faulty"], Path(jobs["output"] + "-full"), jobs["batch"], ranks)


def full_disk_apart(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """Each rank writes its own units, and the last one's disk does not take its second."""
    fail(ShardWriter, "write", after=1, where=number == world - 1)
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        recipe = {**jobs["recipes"]["judged"], "verify": False, "evaluate": None}
        run(recipe, Path(jobs["output"] + "-apart"), jobs["batch"], ranks)


def fail(kind: Any, name: str, *, after: int, where: bool) -> None:
    """Have a method's later calls meet a full disk."""
    whole, calls = getattr(kind, name), itertools.count()

    def failing(self: Any, *args: Any) -> Any:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, *args)

    if where:
        setattr(kind, name, failing)


def rest(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        run(jobs["faulty"], Path(jobs["output"] + "-full"), jobs["batch"], ranks)


def differ(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank has another recipe."""
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        recipe = {**jobs["faulty"], "output": jobs["output"] + "-differ"}
        if number == world - 1:
            recipe["passes"] = [{"rtn": {"bits": 8, "group_size": 32}}]
        run(recipe, Path(recipe["output"]), jobs["batch"], ranks)


def other_files(jobs: dict[str, Any], number: int, world: int, port: int) -> None:
    """The last rank has a model of the same name and shapes in which one weight is another."""
    model = Path(jobs["faulty"]["model"])
    if number == world - 1:
        model = Path(jobs["folder"]) / "elsewhere" / model.name
        shutil.copytree(jobs["faulty"]["model"], model)
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][5, 7] += 1
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with joined(CPU, place_of_rank(number, world, port)) as ranks:
        recipe = {**jobs["faulty"], "model": str(model)}
        run(recipe, Path(jobs["output"] + "-differ"), jobs["batch"], ranks)


def start(work: Any, jobs: dict[str, Any], world: int) -> list[tuple[int, str]]:
    """How each rank ended: its exit code, and the error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(world):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            code, text = 0, ""
            try:
                work(jobs, number, world, port)
            except CompressError as error:
                code, text = error.exit_code, str(error)
            except BaseException:
                code, text = 70, traceback.format_exc()
            os.write(writing, text.encode())
            os._exit(code)
        os.close(writing)
        children.append((child, reading))
    ended = []
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
    return ended


def main() -> None:
    os.fsync = lambda handle: None
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for world in map(int, jobs["worlds"]):
        ended = start(rank, jobs, world)
        if any(code for code, _ in ended):
            sys.exit(f"{world} ranks ended with {ended}")
    if "faulty" in jobs:
        folder = Path(jobs["folder"])
        shutil.copytree(folder / "1" / "judged", folder / "damaged")
        damage(folder / "damaged")
        for world in (1, 3):
            start(damaged, jobs, world)
        began = time.monotonic()
        faults = (short_of_memory, short_while_learning, kill_one, differ, other_files)
        found = {f.__name__: start(f, jobs, 3) for f in faults}
        took = time.monotonic() - began
        began = time.monotonic()
        found |= {f.__name__: start(f, jobs, 3) for f in (full_disk, unsynced, full_disk_apart)}
        found |= {f.__name__: start(f, jobs, 3) for f in (short_second_time, short_for_one_row)}
        found["seconds of disks"] = time.monotonic() - began
        found["rest"] = start(rest, jobs, 2)
        with owned(Path(jobs["output"])):
            found["second"] = start(finish, jobs, 2)
        # Another number of ranks continues.
        continued = start(finish, jobs, 2)
        print(json.dumps({**found, "seconds": took, "continued": continued}))


if __name__ == "__main__":
    main()
