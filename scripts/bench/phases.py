"""Where the time of a block goes: `compress` with a clock around its parts.

    python scripts/bench/phases.py run RECIPE ...             # as python -m compressor
    python -m torch.distributed.run --nproc-per-node 2 scripts/bench/phases.py run RECIPE ...

Writes PHASES/rank-N.json, PHASES being a folder in the environment: for each block the seconds that
each part took without the parts inside it, and beside them those of the threads that read and
write. With PHASES_SYNC=1 a part ends when the GPU is done with it and ranks wait for each other
before they exchange anything, so that each part has what is its own and the whole takes longer.
With PHASES_KERNELS=1 a file of the fourth block's kernels lies beside it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compressor.cli.main import main as command
from compressor.cli.process import TURN, silence_ranks

PARTS = {
    "compressor.run.loop": {
        "require_finite": "upload",
        "start_of": "upload",
        "Loop._observers": "load",
        "Loop._as_written": "decode",
        "Loop._next_inputs": "next inputs",
        "Loop._embed": "embedding",
        "apply_passes": "passes, rest",
        "ModelTarget.encode": "encode",
        "CommitQueue.put": "queue to write",
    },
    "compressor.checkpoint.target": {"ModelTarget.encode": "encode"},
    "compressor.run.reading": {"Reader.whole": "upload"},
    "compressor.checkpoint.background": {"CommitQueue.put": "queue to write"},
    "compressor.runner.block_runner": {"Block.forward": "forward", "Block.load": "load"},
    "compressor.runner.sweep": {"give_back": "heap", "Step.run": "next inputs"},
    "compressor.run.observers": {"observe": "statistics", "observe_beside": "statistics"},
    "compressor.runner.observe": {
        "Observer.add": "Gram matrices",
        "_LazyStats._compute": "statistics of experts",
    },
    "compressor.methods.awq.method": {
        "Awq._search": "search of scales",
        "Awq._search_apart": "search of scales",
        "finished": "rounding",
        "put": "codes put into the unit",
        "_folded": "folds",
    },
    "compressor.methods.awq.finish": {
        "search_clip_gram": "search of clipping",
        "error_of_parts": "errors",
    },
    "compressor.methods.common.second_order": {
        "inverse_factor": "factors",
        "correction": "corrections",
        "_moved": "corrections times weights",
        "_within_rounding": "corrections held within rounding",
        "searched": "search of grids",
        "gptq": "rounding",
        "quantize_all": "rounding",
    },
    "compressor.numerics.gptq": {"_solve": "columns", "gram_error": "errors"},
    "compressor.methods.reconstruct": {
        "refined_rounding": "steps: begun",
        "Reconstruct._refine": "steps, rest",
    },
    "compressor.runner.tunable_block": {
        "TunableBlock.loss": "forward",
        "TunableBlock.loss_and_gradients": "gradients",
        "TunableBlock.loss_and_folded": "gradients",
    },
    "compressor.ranks.group": {
        "Group.each": "division",
        "Group.share": "exchange: values",
        "Group.gather": "exchange: values",
        "Group._from": "exchange: values",
        "Group._made": "exchange: values",
        "Group.gather_rows": "exchange: rows",
        "Group.beside": "exchange: what is left of gradients",
        "Group.sum": "exchange: sums",
        "Group.maximum": "exchange: sums",
        "Group.numbers": "exchange: numbers",
    },
}
EXCHANGES = "exchange: "
THREADS = {
    "compressor.run.reading": {"Reader.read": "reading"},
    "compressor.checkpoint.background": {"CommitQueue._write": "writing"},
}


class Clock:
    """Seconds of the main thread by part, each without those inside it; and of threads."""

    def __init__(self) -> None:
        self.sync = os.environ.get("PHASES_SYNC") == "1"
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.stack = ["rest"]
        self.last = time.perf_counter()
        self.blocks: list[dict[str, Any]] = []
        self.main = threading.main_thread()

    def change(self) -> None:
        """Charge what has passed to the part that runs."""
        if self.sync and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now

    def part(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not self.main:
                return work(*args, **kwargs)
            self.change()
            if (
                self.sync
                and name.startswith(EXCHANGES)
                and not self.stack[-1].startswith(EXCHANGES)
            ):
                self.stack.append("waiting for other ranks")
                dist.all_reduce(torch.zeros(1))
                self.change()
                self.stack.pop()
            self.stack.append(name)
            self.calls[name] += 1
            try:
                return work(*args, **kwargs)
            finally:
                self.change()
                self.stack.pop()

        return timed

    def thread(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.spent[f"thread: {name}"] += time.perf_counter() - began

        return timed

    def finished(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The end of a unit."""
        kernels = os.environ.get("PHASES_KERNELS") == "1"
        profiler: list[Any] = []

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            found = work(*args, **kwargs)
            self.change()
            self.blocks.append({"seconds": dict(self.spent), "calls": dict(self.calls)})
            self.spent.clear()
            self.calls.clear()
            if kernels and len(self.blocks) == 4:
                profiler.append(torch.profiler.profile())
                profiler[0].start()
            if kernels and len(self.blocks) == 5:
                profiler[0].stop()
                by = "self_device_time_total" if torch.cuda.is_initialized() else "cpu_time_total"
                table = profiler[0].key_averages().table(by, row_limit=60, max_name_column_width=70)
                (folder() / f"kernels-{rank()}.txt").write_text(table)
            self.last = time.perf_counter()
            return found

        return timed


def folder() -> Path:
    found = Path(os.environ["PHASES"])
    found.mkdir(parents=True, exist_ok=True)
    return found


def rank() -> str:
    return os.environ.get("RANK", "0")


def replace(module: str, path: str, change: Callable[[Any], Any]) -> None:
    """Put something else in the place of what a module, or a class there, has under a name."""
    holder = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    if (found := holder.__dict__.get(name)) is not None:
        setattr(holder, name, change(found))


def main() -> None:
    clock = Clock()
    done: set[tuple[int, str]] = set()
    for module, parts in PARTS.items():
        for path, name in parts.items():
            *owners, leaf = path.split(".")
            holder: Any = importlib.import_module(module)
            for owner in owners:
                holder = getattr(holder, owner, None)
            if holder is None or (id(holder), leaf) in done:
                continue
            done.add((id(holder), leaf))
            replace(module, path, functools.partial(clock.part, name))
    for module, parts in THREADS.items():
        for path, name in parts.items():
            replace(module, path, functools.partial(clock.thread, name))
    replace("compressor.run.loop", "Loop._finished", clock.finished)
    Future.result = clock.part("waiting for a thread", Future.result)  # type: ignore[method-assign]
    code: Any = 0
    try:
        sys.setswitchinterval(TURN)
        silence_ranks()
        command()
    except SystemExit as ended:
        code = ended.code
    write(clock)
    os._exit(code if isinstance(code, int) else 0)


def write(clock: Clock) -> None:
    """The mean of all blocks but the first, where kernels are compiled; the embedding comes before
    it and the head last."""
    blocks = clock.blocks[2:-1]
    names = sorted({name for block in blocks for name in block["seconds"]})
    mean = {n: sum(b["seconds"].get(n, 0) for b in blocks) / len(blocks) for n in names}
    calls = {n: sum(b["calls"].get(n, 0) for b in blocks) / len(blocks) for n in names}
    own = {n: s for n, s in mean.items() if not n.startswith("thread: ")}
    found = {"whole": sum(own.values()), "ms": {n: round(s * 1e3, 2) for n, s in mean.items()}}
    found["calls"] = {n: c for n, c in calls.items() if c}
    (folder() / f"rank-{rank()}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
