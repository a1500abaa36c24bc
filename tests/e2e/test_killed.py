"""A process that dies at any moment, then the same command: the bytes of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import InputError, Interrupted
from compressor.plan.recipe import load_recipe, make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support.dying import die_at_steps
from tests.support.elsewhere import Elsewhere
from tests.support.killing import kill_at_random

TEXT = "A few words, again and again, which take no time to read. " * 40
CPU = choose_device("cpu")
PASSES: dict[str, list[Any]] = {
    "quantized": [{"awq": {"bits": 4, "group_size": 32}}],
    "original": [{"awq": {"bits": 4, "group_size": 32, "symmetric": False}}],
}
BESIDE = {"bits": 3, "group_size": 32, "scales": "search", "descent": 1, "correction": 0.5}
"""The original's activations are carried beside the quantized model's."""
FORECASTS = {
    **{"block_size": 8, "kernel_size": 4, "stride": 2, "local_blocks": 1, "top_k": 4},
    **{"dense_below": 0, "steps": 3, "rows_per_step": 4, "learning_rate": 0.01},
}


def write_recipe(folder: Path, model: Path, propagate: str, **top: Any) -> Path:
    text = folder / "text.txt"
    text.write_text(TEXT)
    recipe = {
        "model": str(model),
        "output": "unused",
        "calibration": {"data": str(text), "samples": 16, "length": 64},
        "passes": PASSES[propagate],
        "propagate": propagate,
        "max_shard_size": "200KB",
        **top,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    """A process that may be forked: a test's has threads of pytest's."""
    with Elsewhere() as found:
        yield found


def assert_same_files(one: Path, two: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def killed_at_random(
    elsewhere: Elsewhere, folder: Path, model: Path, propagate: str, *, seed: int, **top: Any
) -> int:
    recipe = write_recipe(folder, model, propagate, **top)
    output = folder / "out"
    story = elsewhere(kill_at_random, str(recipe), str(output), seed)
    whole = folder / "out-whole"
    assert sum(path.suffix == ".safetensors" for path in whole.iterdir()) > 1
    assert_same_files(whole, output)
    return int(story["kills"])


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_killed_runs_continue_to_the_same_bytes(
    propagate: str, elsewhere: Elsewhere, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    assert killed_at_random(elsewhere, tmp_path, model, propagate, seed=7) >= 3


def test_killed_runs_with_two_streams_continue_to_the_same_bytes(
    elsewhere: Elsewhere, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    passes = [{"gptq": BESIDE}]
    assert killed_at_random(elsewhere, tmp_path, model, "quantized", seed=3, passes=passes) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_killed_many_times(
    seed: int, elsewhere: Elsewhere, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    assert (
        killed_at_random(elsewhere, tmp_path, model, ["quantized", "original"][seed % 2], seed=seed)
        >= 2
    )


@pytest.mark.parametrize(
    "stride", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_dying_between_any_two_durable_steps(
    stride: int, elsewhere: Elsewhere, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Every rename, sync and write is a place to die: the last renames of a run among them."""
    model = tiny_model("llama", num_hidden_layers=2)
    recipe = write_recipe(tmp_path, model, "quantized")
    story = elsewhere(die_at_steps, str(recipe), str(tmp_path / "out"), 1, stride)
    assert story["steps"] > 40
    assert len(story["died"]) >= 0.8 * story["steps"] / stride


@pytest.mark.parametrize(
    "stride", [23, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_dying_while_forecasts_are_trained(
    stride: int, elsewhere: Elsewhere, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Buffers of hidden states, what is trained, and how far the sweep came: a death between any
    two of their writes leaves nothing that the same command would not mend."""
    model = tiny_model("llama", num_hidden_layers=3)
    recipe = write_recipe(
        tmp_path, model, "quantized", passes=[{"sparda": FORECASTS}], format="dense", verify=False
    )
    story = elsewhere(die_at_steps, str(recipe), str(tmp_path / "out"), 2, stride)
    assert story["steps"] > 100
    assert len(story["died"]) >= 0.8 * story["steps"] / stride


def test_ctrl_c_stops_after_the_unit_and_says_how_to_go_on(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path, tiny_model("llama", num_hidden_layers=8), "quantized", verify=False
    )
    output = tmp_path / "out"
    command = [sys.executable, "-m", "compressor", "run", str(recipe), "-o", str(output)]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"event": "unit"' in line and '"done": 2' in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    told = "".join(lines)
    assert "same command continues" in told and "Traceback" not in told
    assert not (output / "manifest.json").exists()
    committed = len(list((output / ".compress-work" / "units").glob("*.json")))
    assert 2 <= committed < 10
    resumed: list[bool] = []
    prepared = prepare(load_recipe(recipe, output=str(output)), device=CPU)
    compile_checkpoint(prepared, on_unit=lambda done: resumed.append(done.resumed))
    assert sum(resumed) == committed
    prepared = prepare(load_recipe(recipe, output=str(tmp_path / "whole")), device=CPU)
    assert_same_files(output, compile_checkpoint(prepared).output)


def interrupted(recipe: dict[str, Any]) -> None:
    """Leave a run behind that stopped after two units."""
    units: list[str] = []
    prepared = prepare(make_recipe(recipe), device=CPU)
    with pytest.raises(Interrupted):
        compile_checkpoint(
            prepared,
            on_unit=lambda done: units.append(done.name),
            stopping=lambda: len(units) >= 2,
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"recipe\.seed: 0, now 1"),
        ({"passes": [{"awq": {"bits": 4, "group_size": 16}}]}, r"passes\.0\.awq\.group_size"),
        ({"calibration": {"samples": 4}}, r"calibration\.samples: 2, now 4"),
        ({"calibration": {"data": "OTHER"}}, "tokens: "),
        ({"format": "gptq"}, r"recipe\.format"),
        ({"max_shard_size": 100_000}, r"recipe\.max_shard_size"),
        ({"model": "OTHER"}, r"source\.(headers|config)"),
    ],
    ids=["seed", "pass", "samples", "text", "format", "shards", "model"],
)
def test_another_recipe_source_or_text_is_refused_by_key(
    change: dict[str, Any], said: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT)
    other.write_text(TEXT.upper())
    recipe: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "output": str(tmp_path / "out"),
        "calibration": {"data": str(text), "samples": 2, "length": 16},
        "passes": [{"awq": {"bits": 4, "group_size": 32}}],
    }
    interrupted(recipe)
    calibration = {**recipe["calibration"], **change.get("calibration", {})}
    changed = {**recipe, **change, "calibration": calibration}
    if changed["model"] == "OTHER":
        changed["model"] = str(tiny_model("llama", num_hidden_layers=3))
    if calibration["data"] == "OTHER":
        calibration["data"] = str(other)
    with pytest.raises(InputError, match=said) as caught:
        compile_checkpoint(prepare(make_recipe(changed), device=CPU))
    assert "elsewhere with --output" in str(caught.value.hint)


def test_other_weights_under_the_same_headers_are_noticed(tiny_models: Any, tmp_path: Path) -> None:
    """The fingerprint of a unit is its content, compared where it is read again."""
    model = tiny_models.build("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "calibration": {"data": str(tmp_path / "text.txt"), "samples": 2, "length": 16},
        "passes": [{"awq": {"bits": 4, "group_size": 32}}],
    }
    interrupted(recipe)
    tiny_models.build("llama", model, seed=1)
    with pytest.raises(InputError, match="not what the interrupted run read"):
        compile_checkpoint(prepare(make_recipe(recipe), device=CPU))


def test_two_runs_on_one_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "model": str(tiny_model("llama")),
            "output": str(tmp_path / "out"),
            "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
        }
    )
    prepared = prepare(recipe, device=CPU)
    refused: list[str] = []

    def second(done: Any) -> None:
        with pytest.raises(InputError) as caught:
            compile_checkpoint(prepared)
        refused.append(caught.value.message)

    compile_checkpoint(prepared, on_unit=second)
    assert len(refused) == 4 and "another run is writing" in refused[0]
    assert compile_checkpoint(prepared).already


def test_a_dead_run_leaves_no_lock(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The lock is the kernel's: it goes with its process, however that ended."""
    output = tmp_path / "out"
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from compressor.checkpoint.workspace import owned\n"
        f"with owned(Path({str(output)!r})) as work:\n"
        "    work.mkdir(); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    recipe = {
        "model": str(tiny_model("llama")),
        "output": str(output),
        "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
    }
    prepared = prepare(make_recipe(recipe), device=CPU)
    with pytest.raises(InputError, match="another run is writing"):
        compile_checkpoint(prepared)
    holder.kill()
    holder.wait()
    started = time.monotonic()
    compile_checkpoint(prepared)
    assert (output / "manifest.json").exists() and time.monotonic() - started < 60
