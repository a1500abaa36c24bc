"""Runs and their verification on a CUDA device, where the kernels multiply by whole layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.findings import VerifyReport
from compressor.verify.verify import verify

pytestmark = pytest.mark.gpu
DEVICE = choose_device("auto")


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    data = {"model": str(model), "output": str(output), "passes": passes, **top}
    data.setdefault("calibration", {"samples": 8, "length": 64})
    return compile_checkpoint(prepare(make_recipe(data), device=DEVICE)).output


def kernels(report: VerifyReport, kernel: str) -> set[str]:
    """Linears whose layer this kernel multiplied by, as Triton code."""
    assert report.ok, report.damage
    detail = next(check.detail for check in report.checks if check.name == "kernels")
    assert DEVICE.type != "cuda" or ("whole layers" in detail and "on the GPU" in detail)
    found = [layer for layer in report.layers if layer.kernel == kernel]
    assert all(layer.triton and layer.kernel_error is not None for layer in found)
    return {layer.linear for layer in found}


@pytest.mark.parametrize(
    "model_type, distill, bits",
    [("qwen2", "logits", 1), ("mixtral", "layer", 2)],
)
def test_a_delta(
    model_type: str, distill: str, bits: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, fine = (tiny_model(model_type, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    params = {"base": str(base), "distill": distill, "bits": bits, "steps": 4, "lr": 1e-4}
    output = run(fine, tmp_path / "delta", [{"bitdelta": params}])
    report = verify(output, base=str(base), against=open_source(fine), device=DEVICE)
    coded = {name.rpartition(".")[0] for name in load_file(output / "model.safetensors")
             if name.endswith("delta_signs")}  # fmt: skip
    assert kernels(report, "delta_matmul") == coded and coded


@pytest.mark.parametrize(
    "kernel, passes",
    [
        ("w4a16", [{"awq": {"bits": 4, "group_size": 32}}]),
        ("w4a16", [{"gptq": {"bits": 4, "group_size": 32, "symmetric": False}}]),
        ("w8a8", [{"smoothquant": {"bits": 8}}]),
        ("nvfp4", [{"nvfp4": {}}]),
    ],
    ids=["awq", "gptq", "w8a8", "nvfp4"],
)
def test_a_quantized_checkpoint(
    kernel: str, passes: list[Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    output = run(model, tmp_path / "out", passes)
    report = verify(output, against=open_source(model), device=DEVICE)
    assert len(kernels(report, kernel)) == 14


def test_damage_is_found_and_the_command_fails(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    output = run(model, tmp_path / "out", [{"awq": {"bits": 4, "group_size": 32}}])
    arguments = ["verify", str(output), "--device", DEVICE.type, "--json"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    file = output / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 2] ^= 1 << 5
    save_file(tensors, file, metadata={"format": "pt"})
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj" in json.dumps(json.loads(result.stdout)["damage"])
