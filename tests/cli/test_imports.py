"""What a command may not import: each of these costs seconds where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare

CPU = torch.device("cpu")

HEAVY = ("torch", "transformers", "numpy", "pydantic", "tokenizers", "huggingface_hub", "triton")
"""Not for `--help`."""

OF_RUNS = ("transformers", "triton", "sympy", "datasets", "accelerate", "httpx", "jinja2")
"""Not for what reads headers."""

NEVER = (
    *("sklearn", "scipy", "pandas", "matplotlib", "jax", "tensorflow", "flax", "lightning"),
    *("pytorch_lightning", "torchvision", "torchaudio", "datasets", "gguf", "IPython"),
)
"""Not for a run either."""

SHADOWED = ("sklearn", "pandas", "lightning")
"""Packages that the test puts in the way, to see who takes them because they are there."""

PROGRAM = """
import json, os, sys
def end(code):
    with open(os.environ["SEEN"], "w") as file:
        json.dump([code, sorted({name.partition(".")[0] for name in sys.modules})], file)
    ended(code)
ended, os._exit = os._exit, end
from compressor.cli.process import program
program()
"""


def imported(folder: Path, *arguments: str) -> set[str]:
    """Top-level modules of a command that did what it was told."""
    for name in SHADOWED:
        (folder / "shadows" / name).mkdir(parents=True, exist_ok=True)
        (folder / "shadows" / name / "__init__.py").write_text("__version__ = '9.9'\n")
    path = os.pathsep.join([str(folder / "shadows"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "SEEN": str(folder / "seen.json")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    code, modules = json.loads((folder / "seen.json").read_text())
    assert code == 0, done.stderr
    return set(modules)


@pytest.fixture(scope="module")
def recipes(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a recipe without data and one with it."""
    folder = tmp_path_factory.mktemp("recipes")
    model = tiny_models.build("llama", folder / "model")
    found: dict[str, str] = {}
    grid = {"bits": 4, "group_size": 32, "symmetric": True}
    for name in ("rtn", "awq"):
        recipe = {
            "model": str(model),
            "output": str(folder / name),
            "passes": [{name: grid}],
            "calibration": {"data": "bundled/prose", "samples": 2, "length": 16},
            "report": False,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
        found[name] = str(folder / f"{name}.yaml")
    return {**found, "model": str(model)}


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not imported(tmp_path, "--help") & {*HEAVY, *OF_RUNS, *NEVER}


def test_headers_are_read_without_what_runs_models(recipes: dict[str, str], tmp_path: Path) -> None:
    assert not imported(tmp_path, "plan", recipes["rtn"]) & {*OF_RUNS, *NEVER}
    assert not imported(tmp_path, "inspect", recipes["model"]) & {*OF_RUNS, *NEVER}


def test_a_run_imports_nothing_that_only_happens_to_be_installed(
    recipes: dict[str, str], tmp_path: Path
) -> None:
    seen = imported(tmp_path, "run", recipes["awq"], "--device", "cpu", "--set", "verify=false")
    assert "transformers" in seen
    assert not seen & set(NEVER)


@pytest.fixture(scope="module")
def packed(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of int4 weights."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_models.build("llama", folder / "model", dtype=torch.float16)
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}]
    recipe = {"model": str(model), "output": str(folder / "out"), "passes": passes}
    return str(compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output)


def test_files_are_proved_without_what_runs_models(packed: str, tmp_path: Path) -> None:
    """Packed linears are read, decoded and multiplied by kernels; no block of the model runs."""
    without = {*OF_RUNS, *NEVER} - {"triton"}
    assert not imported(tmp_path, "verify", packed, "--device", "cpu") & without


def test_a_conversion_runs_no_model(packed: str, tmp_path: Path) -> None:
    output = [str(tmp_path / "out"), "--format", "autoawq", "--device", "cpu"]
    seen = imported(tmp_path, "convert", packed, *output, "--no-verify")
    assert not seen & {"transformers", "accelerate", *NEVER}


def test_an_original_is_compared_with_in_a_process_of_its_own(packed: str, tmp_path: Path) -> None:
    """Beside a GPU; here by the same call for a CPU."""
    asked = f"Path({packed!r}), against=Path({packed!r}), device=torch.device('cpu'), apart=apart"
    text = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from compressor.verify.apart import Apart\nfrom compressor.verify.verify import verify\n"
        f"with Apart('cpu') as apart:\n    report = verify({asked})\n"
        "assert report.ok and 'outputs to the original' in [c.name for c in report.checks]\n"
        "assert 'transformers' not in sys.modules, 'the comparison was made here'\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
