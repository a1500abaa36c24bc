"""QoQ and GPTQ through whole runs: written, read back, evaluated with their inputs and KV cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.errors import Problems
from compressor.evaluate.perplexity import evaluate
from compressor.ir.scheme import ActivationSpec, KVSpec
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare

CPU = choose_device("cpu")


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Any:
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": {"samples": 16, "length": 32},
            "passes": passes,
            **top,
        }
    )
    return compile_checkpoint(prepare(recipe, device=CPU))


def kl(output: Path, model: Path) -> float:
    ids = torch.randint(2, 256, (4, 48), generator=torch.Generator().manual_seed(2))
    found = evaluate(
        open_source(output), ids, device=CPU, dtype=torch.float32, against=open_source(model)
    )
    assert found.kl is not None
    return found.kl.value


@pytest.mark.parametrize(
    "model_type, group_size",
    [("llama", 32), ("qwen2", 32), ("mixtral", 32), ("opt", None)],
)
def test_qoq_writes_w4a8kv4(
    model_type: str, group_size: int | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    top: dict[str, Any] = {"format": "qserve"}
    params: dict[str, Any] = {"group_size": group_size, "min_tokens": 16}
    if model_type == "opt":
        params["keep_mean"] = True
    if model_type in ("qwen2", "opt"):
        top["untie"] = True
    done = run(model, tmp_path / "qoq", [{"qoq": params}], **top)
    source = open_source(done.output)
    assert source.schemes.kv == KVSpec("int4", "token_head")
    quantized = {n: s for n, s in source.schemes.linears.items() if s.weight is not None}
    assert {s.input for s in quantized.values()} == {ActivationSpec("int8", "token")}
    rows = [row for unit in done.units for row in unit.rows]
    assert {row["pass"] for row in rows} >= {"smooth_attention", "progressive"}
    kept = [row for row in rows if row["pass"] == "progressive" and "rows_kept_nearest" in row]
    assert kept and all(row["error"] <= row["nearest_error"] for row in kept)
    naive = [{"progressive": {"group_size": group_size, "gptq": False, "clip": False}}]
    naive += [{"kv_cache": {"element": "int4"}}]
    plain = run(model, tmp_path / "naive", naive, **top).output
    ours, theirs = kl(done.output, model), kl(plain, model)
    # Random weights have no outliers to gain from: only that nothing is broken shows here.
    assert 0 < ours < 2 * theirs < 1, (ours, theirs)


def test_a_written_recipe_runs_again(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The recipe beside the artefact, in which qoq is its steps, writes the same bytes."""
    import yaml

    model = tiny_model("llama")
    one = run(model, tmp_path / "one", [{"qoq": {"group_size": 32}}], format="qserve").output
    (path,) = one.glob("*recipe*")
    data = yaml.safe_load(path.read_text())
    assert next(iter(data["passes"][0])) == "rotate"
    recipe = make_recipe({**data, "model": str(model), "output": str(tmp_path / "two")})
    two = compile_checkpoint(prepare(recipe, device=CPU)).output
    for shard in one.glob("*.safetensors"):
        assert shard.read_bytes() == (two / shard.name).read_bytes()


@pytest.mark.parametrize(
    "passes, fmt",
    [
        ([{"gptq": {"bits": 4, "group_size": 32}}], "gptq"),
        ([{"gptq": {"bits": 4, "group_size": 32, "symmetric": False}}], "compressed-tensors"),
        ([{"rotate": {}}, {"gptq": {"bits": 4, "group_size": 32}}], "compressed-tensors"),
        ([{"awq": {}}, {"gptq": {"bits": 4, "group_size": 32}}], "autoawq"),
        (
            ["smoothquant", {"gptq": {"bits": 8, "group_size": None, "activations": "token"}}],
            "compressed-tensors",
        ),
        ([{"gptq": {"grid": "nvfp4"}}], "compressed-tensors"),
        ([{"gptq": {"grid": "nvfp4", "activations": "calibrated"}}], "modelopt-nvfp4"),
        ([{"smooth_attention": {}}, {"kv_cache": {}}, {"rtn": {"bits": 8}}], "compressed-tensors"),
    ],
)
def test_gptq_composes_and_its_files_read_back(
    passes: list[Any], fmt: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    if fmt == "autoawq":
        passes = [passes[0], {"gptq": {**passes[1]["gptq"], "symmetric": False}}]
    if "rtn" in passes[-1]:
        passes = [*passes[:-1], {"rtn": {"bits": 8, "group_size": 32}}]
    done = run(model, tmp_path / "out", passes, format=fmt)
    assert 0 < kl(done.output, model) < 0.2
    config = json.loads((done.output / "config.json").read_text())["quantization_config"]
    assert config.get("desc_act", False) is False
    for shard in done.output.glob("*.safetensors"):
        from safetensors import safe_open

        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith("g_idx"):
                    index = file.get_tensor(name)
                    assert fmt == "gptq" and torch.equal(index, torch.arange(len(index)) // 32)


def test_plan_refuses_what_qserve_cannot_hold(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(Problems, match="compressed-tensors cannot hold"):
        run(tiny_model("llama"), tmp_path / "out", [{"progressive": {"group_size": 32}}])
    with pytest.raises(Problems, match="group_size 128 does not divide"):
        run(tiny_model("llama"), tmp_path / "out", ["qoq"], format="qserve")


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, None])
def test_qoq_on_a_gpu(
    group_size: int | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "calibration": {"samples": 16, "length": 32},
            "passes": [{"qoq": {"group_size": group_size, "min_tokens": 16}}],
            "format": "qserve",
        }
    )
    done = compile_checkpoint(prepare(recipe, device=choose_device("cuda")))
    assert 0 < kl(done.output, model) < 1
