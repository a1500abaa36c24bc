"""Recipes run from end to end on a tiny model of every family, and what they write loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support.tiny_models import TYPES

CALIBRATION = {"samples": 8, "length": 32}
CPU = choose_device("cpu")


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": CALIBRATION,
            "passes": passes,
            **top,
        }
    )
    return compile_checkpoint(prepare(recipe, device=CPU)).output


@pytest.mark.interop
@pytest.mark.parametrize("model_type", TYPES)
def test_awq_runs_on_every_family_and_loads_in_transformers(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """What transformers and compressed-tensors read is what our own reader reads."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(model_type)
    output = run(model, tmp_path / "out", [{"awq": {"bits": 4, "group_size": 32}}])
    source = open_source(output)
    assert source.quantized
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.arange(2, 34)[None]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours: dict[str, torch.Tensor] = {}
    for unit in source.layout.units:
        ours |= {k: v.float() for k, v in source.read_unit(unit).dequantized().items()}
    dense = tmp_path / "dense"
    shutil.copytree(model, dense)
    from safetensors.torch import save_file

    for old in dense.glob("*.safetensors*"):
        old.unlink()
    save_file({k: v.contiguous() for k, v in ours.items()}, dense / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    found = loaded(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    original = reference(ids).logits
    assert (found - original).norm() < 0.9 * original.norm()
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == 35


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_needs_no_calibration(
    symmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = run(
        tiny_model("llama"),
        tmp_path / "out",
        [{"rtn": {"bits": 4, "group_size": 32, "symmetric": symmetric}}],
    )
    about = json.loads((output / "manifest.json").read_text())["about"]
    assert about["tokens"] is None
    assert not (output / ".compress-work").exists()


def test_two_runs_write_the_same_bytes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    passes = [{"awq": {"bits": 4, "group_size": 32}}]
    one = run(tiny_model("qwen3"), tmp_path / "one", passes)
    two = run(tiny_model("qwen3"), tmp_path / "two", passes)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_finished_output_is_left_alone_and_another_recipe_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, output = tiny_model("llama"), tmp_path / "out"
    run(model, output, [{"rtn": {"bits": 4, "group_size": 32}}])
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    run(model, output, [{"rtn": {"bits": 4, "group_size": 32}}])
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(InputError, match=r"recipe\.passes\.0\.rtn\.bits: 4, now 3"):
        run(model, output, [{"rtn": {"bits": 3, "group_size": 32}}])


def test_a_folder_of_others_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run(tiny_model("llama"), tmp_path, [{"rtn": {"bits": 4, "group_size": 32}}])
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_nan_in_the_source_is_an_input_error_that_names_the_tensor(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(model, tmp_path / "out", [{"rtn": {"bits": 4, "group_size": 32}}])
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_everything_wrong_is_listed_at_once(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(Problems) as caught:
        run(
            tiny_model("qwen2"),
            tmp_path / "out",
            [
                {"rtn": {"targets": ["mlp.dwon", "attn.o"], "group_size": 7}},
                {"rtn": {"targets": "attn.q", "bits": 8, "group_size": 32}},
                {"rtn": {"targets": "lm_head", "ignore": [], "group_size": 32}},
            ],
        )
    text = str(caught.value)
    assert "mlp.dwon" in text and "7" in text
    assert "different schemes" in text
    assert "shares its weight" in text
    assert not (tmp_path / "out").exists()


def test_files_folder_and_disk_are_listed_with_what_the_recipe_gets_wrong(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    second = {
        n for n in tensors if ".layers.1." in n or n in ("model.norm.weight", "lm_head.weight")
    }
    files = {name: f"model-0000{1 + (name in second)}-of-00002.safetensors" for name in tensors}
    (model / "model.safetensors").unlink()
    save_file(
        {n: t for n, t in tensors.items() if n not in second},
        model / "model-00001-of-00002.safetensors",
    )
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.txt").write_text("theirs")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Problems) as caught:
        run(model, tmp_path / "out", [{"rtn": {"targets": ["attn.o", "mpl.up"], "group_size": 7}}])
    text = str(caught.value)
    for said in (
        "model-00002-of-00002.safetensors is missing",
        "does not divide",
        "'mpl.up' matches no",
        "theirs.txt",
        "0.01 MB left",
    ):
        assert said in text, (said, text)
    assert sorted(tmp_path.rglob("*")) == before


def test_untied_head_is_written_and_quantized(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = run(
        tiny_model("qwen2"),
        tmp_path / "out",
        [{"rtn": {"targets": "lm_head", "ignore": [], "bits": 8, "group_size": 32}}],
        untie=True,
    )
    source = open_source(output)
    assert source.layout.tied is None
    assert source.schemes.linears["lm_head"].weight is not None
    embedding = source.read_unit(source.layout.units[0]).tensors["model.embed_tokens.weight"]
    head = source.read_unit(source.layout.units[-1]).dequantized()["lm_head.weight"]
    assert (head - embedding.float()).abs().max() < 0.05
