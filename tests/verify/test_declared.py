"""Every key of the files that tell loaders what the weights are is held against what was written,
also where such a file was signed again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.find import locate
from compressor.checkpoint.manifest import DECLARED, MANIFEST_NAME, as_recorded, read_manifest
from compressor.plan.recipe import make_recipe
from compressor.run.convert import convert
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify.compare_config import declared_problems
from compressor.verify.verify import verify
from tests.support.damages import sign
from tests.support.tiny_models import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what was written of it with a quantized cache."""
    work = tmp_path_factory.mktemp("declared")
    model = build("llama", work / "model", dtype=torch.bfloat16)
    recipe = {
        "model": str(model),
        "output": str(work / "out"),
        "passes": [{"rtn": {"bits": 8, "group_size": 32}}, {"kv_cache": {"element": "fp8"}}],
        "calibration": {"samples": 4, "length": 32},
        "format": "compressed-tensors",
        "verify": False,
        "report": False,
    }
    return model, compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output


def damaged(folder: Path, work: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = Path(shutil.copytree(folder, work / "copy"))
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    sign(copy)
    return copy


def failed(folder: Path, model: Path) -> dict[str, str]:
    report = verify(folder, against=model, device=CPU)
    return {check.name: check.detail for check in report.checks if not check.ok}


def quantization(config: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = config["quantization_config"]
    return entry


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "dtype": lambda c: c.update(dtype="float16"),
    "kv_cache_scheme": lambda c: quantization(c).pop("kv_cache_scheme"),
    "ignore": lambda c: quantization(c).update(ignore=[]),
    "vocab_size": lambda c: c.update(vocab_size=c["vocab_size"] * 2),
    "use_cache": lambda c: c.update(use_cache=False),
    "added": lambda c: c.update(added=None),
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_key(made: tuple[Path, Path], key: str, tmp_path: Path) -> None:
    folder = damaged(made[1], tmp_path, CHANGES[key])
    report = verify(folder, against=made[0], device=CPU)
    assert not report.ok
    assert any(key in problem for problem in report.damage), report.damage


def test_what_was_written_passes(made: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in (made[1], damaged(made[1], tmp_path, lambda config: None)):
        report = verify(folder, against=made[0], device=CPU)
        assert report.ok, report
        assert "config as written" in [check.name for check in report.checks]


@pytest.mark.parametrize("key", ["dtype", "kv_cache_scheme"])
def test_without_a_record_tensors_tell(made: tuple[Path, Path], key: str, tmp_path: Path) -> None:
    folder = damaged(made[1], tmp_path, CHANGES[key])
    manifest = read_manifest(folder)
    assert manifest is not None
    about = {k: v for k, v in manifest.about.items() if k != DECLARED}
    (folder / MANIFEST_NAME).write_bytes(replace(manifest, about=about).to_bytes())
    found = failed(folder, made[0])
    assert list(found) == ["config to the original"] and "config.json says" in found.popitem()[1]


def test_a_conversion_notes_its_own_files(made: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "dense"
    convert(locate(str(made[1]), fetch=True), output, format="dense", device=CPU)
    manifest = read_manifest(output)
    assert manifest is not None
    assert manifest.about[DECLARED] == {
        "config.json": as_recorded((output / "config.json").read_bytes())
    }
    convert(locate(str(made[1]), fetch=True), output, format="dense", device=CPU)  # nothing differs


def test_long_values_are_shown_where_they_part(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.mlp.gate" for number in range(30)]
    (tmp_path / "config.json").write_text(json.dumps({"ignore": names}))
    (problem,) = declared_problems(tmp_path, {"config.json": {"ignore": [*names[:-1], "lm_head"]}})
    here, before = problem.split(", the run wrote ")
    assert names[-1] in here and "lm_head" in before and len(problem) < 300


def test_numbers_that_json_does_not_know_are_noted_by_name() -> None:
    assert as_recorded('{"a": [Infinity, -Infinity, NaN]}') == {
        "a": ["Infinity", "-Infinity", "NaN"]
    }
