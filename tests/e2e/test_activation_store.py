"""`activation_store` of a recipe: the same bytes with it and without, and fewer blocks run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import Interrupted, Problems
from compressor.plan.recipe import ActivationStore, make_recipe
from compressor.run.activation_store import open_activations
from compressor.run.judge import judge
from compressor.run.sensitivity import measure_sensitivity
from compressor.run.session import choose_device, compile_checkpoint, prepare

CPU = choose_device("cpu")
GPTQ = {"bits": 4, "group_size": 32, "min_tokens": 16, "correction": 0.0}
BLOCKS, ROWS = 2, 6


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=BLOCKS)


def recipe(model: Path, output: Path, store: object = None, **more: Any) -> Any:
    return make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": {"data": "bundled/prose", "samples": ROWS, "length": 48},
            "passes": [{"gptq": GPTQ}],
            **({} if store is None else {"activation_store": store}),
            **more,
        }
    )


def written(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "manifest.json", "recipe.yaml", "config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({"propagate": "original"}, BLOCKS - 1),
        ({"passes": [{"gptq": {**GPTQ, "correction": 0.5}}]}, 2 * (BLOCKS - 1)),
        ({}, BLOCKS - 1),
    ],
)
def test_a_run_writes_the_same_bytes(
    change: dict[str, Any], known: int, model: Path, tmp_path: Path
) -> None:
    """What is known to a second run: the streams of all blocks but the last."""
    compile_checkpoint(prepare(recipe(model, tmp_path / "a", **change), device=CPU))
    wanted = written(tmp_path / "a")
    assert len(wanted) == 4 or "model.safetensors" in wanted
    for number, read in ((1, 0), (2, known * ROWS)):
        store = str(tmp_path / "acts")
        prepared = prepare(recipe(model, tmp_path / str(number) / "a", store, **change), device=CPU)
        compile_checkpoint(prepared)
        assert written(tmp_path / str(number) / "a") == wanted
        assert prepared.activations is not None and prepared.activations.read == read


def test_a_resumed_run_reads_what_it_has_checked(model: Path, tmp_path: Path) -> None:
    def ready() -> Any:
        return prepare(recipe(model, tmp_path / "a", str(tmp_path / "acts")), device=CPU)

    compile_checkpoint(prepare(recipe(model, tmp_path / "whole" / "a"), device=CPU))
    done: list[str] = []
    with pytest.raises(Interrupted):
        compile_checkpoint(
            ready(),
            on_unit=lambda unit: done.append(unit.name),
            stopping=lambda: len(done) >= 2,
        )
    (entry,) = (tmp_path / "acts").glob("*.bin")
    raw = bytearray(entry.read_bytes())
    raw[11] ^= 4
    entry.write_bytes(raw)
    prepared = ready()
    compile_checkpoint(prepared)
    assert prepared.activations.read == 0
    assert written(tmp_path / "a") == written(tmp_path / "whole" / "a")


def test_the_original_runs_once_for_several_recipes(model: Path, tmp_path: Path) -> None:
    """Of two checkpoints that are evaluated, the second reads what the original makes."""
    evaluate = {"windows": 4, "length": 32, "data": "bundled/prose"}
    read = []
    for name, bits in (("a", 4), ("b", 8)):
        passes = [{"rtn": {"bits": bits, "group_size": 32}}]
        found = []
        for store in (None, str(tmp_path / "acts")):
            output = tmp_path / f"{name}{store is None}"
            more = {"passes": passes, "evaluate": evaluate, "verify": False}
            prepared = prepare(recipe(model, output, store, **more), device=CPU)
            verdict = judge(prepared, compile_checkpoint(prepared))
            assert verdict.evaluation is not None
            found.append({**verdict.evaluation.to_json(), "seconds": 0})
        assert found[0] == found[1]
        read.append(prepared.activations.read)
    assert read == [0, BLOCKS * 4]


def test_sensitivities_are_the_same(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, 256, (4, 32), generator=torch.Generator().manual_seed(3))
    data = {"model": str(model), "output": "out", "passes": [{"rtn": {"group_size": 32}}]}
    store = ActivationStore(dir=str(tmp_path / "acts"))
    found = []
    for opened in (None, open_activations(store, CPU), last := open_activations(store, CPU)):
        source = open_source(model)
        found.append(
            measure_sensitivity(data, source, (3, 8), ids, device=CPU, batch=2, activations=opened)
        )
    assert found[0] == found[1] == found[2]
    assert last is not None and (last.read, last.ran) == (BLOCKS * 4, 0)


def test_a_store_that_will_not_do_is_said_before_anything_is_read(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "acts").write_text("")
    with pytest.raises(Problems, match="is a file"):
        prepare(recipe(model, tmp_path / "a", str(tmp_path / "acts")), device=CPU)
    with pytest.raises(Problems, match="not a size"):
        recipe(model, tmp_path / "a", {"max_size": "many"})
    with pytest.raises(Problems, match=r"activation_store\.size"):
        recipe(model, tmp_path / "a", {"size": "1GB"})


def test_reports_count_what_was_read(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\noutput: {tmp_path / 'a'}\npasses: [rtn: {{bits: 4, group_size: 32}}]\n"
        f"activation_store: {tmp_path / 'acts'}\n"
        "evaluate: {windows: 4, length: 32, data: bundled/prose}\nverify: false\n"
    )
    for read in (0, BLOCKS * 4):
        said = CliRunner().invoke(cli, ["run", str(path), "--json", "--again"])
        assert json.loads(said.stdout)["activations"] == {"read": read, "ran": BLOCKS * 4 - read}
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["activations"] == {"read": BLOCKS * 4, "ran": 0}
    assert f"{BLOCKS * 4} were read" in (tmp_path / "a" / "report.html").read_text()
