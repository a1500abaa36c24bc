"""Memory of a run is one unit: sixteen layers take what four take, and what the plan said."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.plan import estimate as estimates
from compressor.plan.estimate import STARTED_BYTES, estimate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import Recipe, make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.runner import expert_groups
from tests.support.scripts import load

SLACK = 0.25


def compress(command: str, recipe: Path) -> dict[str, Any]:
    """The JSON that a command prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "compressor", command, str(recipe), "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("method", "judged"),
    [("awq", "evaluate: {windows: 2, length: 64}"), ("rtn", "verify: false")],
    ids=["awq", "rtn"],
)
def test_what_a_process_takes_is_planned_for_the_build_of_pytorch_that_is_installed(
    method: str, judged: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A tiny model takes next to nothing, so that this is about everything else. `rtn` loads
    neither tokenizer nor model code."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model('llama')}\noutput: {tmp_path / 'out'}\n{judged}\n"
        f"passes: [{method}: {{bits: 4, group_size: 32}}]\n"
        "calibration: {samples: 8, length: 32}\n"
    )
    planned = compress("plan", recipe)["estimates"]["host_bytes"]
    run = compress("run", recipe)
    assert run["planned_host_bytes"] == pytest.approx(planned, rel=0.05)
    assert run["peak_host_bytes"] == pytest.approx(planned, rel=SLACK)


@pytest.mark.parametrize("ahead", [False, True])
def test_page_locked_memory_is_planned_as_pytorch_keeps_it(
    ahead: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Played through: blocks of powers of two, given back to a pool and taken from it again."""
    recipe = make_recipe(
        {
            "model": str(tiny_model("llama")),
            "output": str(tmp_path / "out"),
            "passes": [{"awq": {"bits": 4, "group_size": 32}}],
            "verify": False,  # which holds both checkpoints' units
        }
    )
    plan, device = make_plan(recipe, open_source(Path(recipe.model))), torch.device("cuda")
    alone = estimate(plan, device=device, resident=1000)
    free: Counter[int] = Counter()
    pool = 0

    def take(sizes: Iterable[int]) -> Counter[int]:
        nonlocal pool
        taken = Counter(next(2**k for k in range(64) if 2**k >= size) for size in sizes)
        pool += sum(size * count for size, count in (taken - free).items())
        free.subtract(taken & free)
        return taken

    source_of = plan.source
    reads = (source_of.checkpoint.pieces(source_of.names(u.layout)) for u in plan.units)
    source, written = take(next(reads)), Counter[int]()
    for unit in plan.units:
        if ahead and unit.layout.kind == "block":  # it is on the device by now
            free += source
            source = Counter()
        coming = take(next(reads, []))
        results = take(spec.nbytes for spec in unit.outputs.values())
        free += source + written
        source, written = coming, results
    bound = None if ahead else alone.device_bytes - 1
    planned = estimate(plan, device=device, resident=1000, device_memory=bound)
    assert planned.ahead is ahead
    assert planned.host_bytes == 1000 + STARTED_BYTES["cuda"] + pool


def test_inputs_wait_in_main_memory_where_the_device_has_no_room_for_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    calibration = {"samples": 64, "length": 128}
    recipe = make_recipe(
        {
            "model": str(tiny_model("llama")),
            "output": str(tmp_path / "out"),
            "passes": [{"awq": {"bits": 4, "group_size": 32}}],
            "calibration": calibration,
            "verify": False,
        }
    )
    plan, device = make_plan(recipe, open_source(Path(recipe.model))), torch.device("cuda")
    free = estimate(plan, device=device, resident=0)
    assert not free.offload and free.batch == 64
    bound = free.device_bytes // 2
    tight = estimate(plan, device=device, resident=0, device_memory=bound)
    assert tight.batch < 64 and tight.device_bytes <= bound
    least = estimate(plan, device=device, resident=0, device_memory=1)
    assert least.offload and least.batch == 1
    free = estimate(plan, device=device, resident=0, device_memory=free.device_bytes - 1)
    assert not free.ahead and free.batch == 64
    hidden = plan.layout.sizes.hidden
    assert least.host_bytes - free.host_bytes == 4 * 64 * 128 * hidden  # in float32
    assert least.device_bytes < tight.device_bytes


def test_experts_wait_in_main_memory_where_they_do_not_fit_beside_each_other(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(experts(tiny_model, tmp_path / "out"), open_source(tiny_model("qwen3_moe")))
    device = torch.device("cuda")
    free = estimate(plan, device=device, resident=0)
    assert free.ahead and not free.experts_apart
    # Page-locked memory is of other sizes where the next block is brought beside this one.
    free = estimate(plan, device=device, resident=0, device_memory=free.device_bytes - 1)
    assert not free.ahead and not free.experts_apart
    tight = estimate(plan, device=device, resident=0, device_memory=1)
    assert tight.experts_apart
    weights = [x for x in plan.layout.blocks[0].linears if x.expert is not None]
    codes = sum(x.out_features * x.in_features for x in weights)
    hidden = 4 * 4 * 32 * plan.layout.sizes.hidden
    assert tight.host_bytes - free.host_bytes == codes + hidden
    monkeypatch.setattr(estimates, "memory_of", lambda device: 1)  # of a small GPU
    assert estimate(plan, device=device, resident=0).experts_apart


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_experts_that_come_in_groups_are_written_to_the_same_bytes(
    method: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *, apart: bool) -> dict[str, bytes]:
        recipe = experts(tiny_model, tmp_path / name, method)
        prepared = prepare(recipe, device=torch.device("cpu"))
        estimates = replace(prepared.estimates, experts_apart=apart)
        made = compile_checkpoint(replace(prepared, estimates=estimates))
        return {file.name: file.read_bytes() for file in made.output.glob("*.safetensors")}

    beside = run("beside", apart=False)
    monkeypatch.setattr(expert_groups, "WEIGHTS", 1)
    assert beside == run("apart", apart=True)


def experts(tiny_model: Callable[..., Path], output: Path, method: str = "awq") -> Recipe:
    return make_recipe(
        {
            "model": str(tiny_model("qwen3_moe")),
            "output": str(output),
            "passes": [{method: {"bits": 4, "group_size": 32, "min_tokens": 1}}],
            "calibration": {"samples": 4, "length": 32},
            "verify": False,
        }
    )


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth_and_is_as_planned(tmp_path: Path) -> None:
    """Twelve more layers have 300 MB of weights."""
    models, peaks = load("scripts/make_random_model.py"), []
    for layers in (4, 16):
        model, recipe = tmp_path / f"model-{layers}", tmp_path / f"{layers}.yaml"
        models.write(model, models.SHAPES["small"], layers=layers)
        recipe.write_text(
            f"model: {model}\noutput: {tmp_path}/out-{layers}\nverify: false\n"
            "passes: [awq: {bits: 4, group_size: 128}]\n"
            "calibration: {samples: 8, length: 64}\n"
        )
        run = compress("run", recipe)
        assert run["peak_host_bytes"] == pytest.approx(run["planned_host_bytes"], rel=SLACK)
        peaks.append(run["peak_host_bytes"])
    assert peaks[1] < peaks[0] + 60e6, peaks
