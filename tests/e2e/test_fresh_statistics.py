"""What a pass changes is seen anew by the passes after it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare

AWQ = {"bits": 4, "group_size": 32}
INT8_CACHE = {"kv_cache": {"element": "int8"}}


def cache_scales(model: Path, output: Path, passes: list[Any]) -> list[tuple[float, float]]:
    """Of keys and of values, by block."""
    data = {
        "model": str(model),
        "output": str(output),
        "calibration": {"samples": 8, "length": 32},
        "passes": passes,
    }
    done = compile_checkpoint(prepare(make_recipe(data), device=choose_device("cpu")))
    source = open_source(done.output)
    found = []
    for unit in source.layout.units[1:-1]:
        extra = {k.rpartition(".")[2]: float(v) for k, v in source.read_unit(unit).extra.items()}
        found.append((extra["k_scale"], extra["v_scale"]))
    return found


def test_scales_of_the_cache_are_those_of_the_rescaled_values(
    tiny_models: Any, tmp_path: Path
) -> None:
    """AWQ divides values with large channels, whether it rounds itself or leaves that to rtn."""
    model = tiny_models.build("llama", tmp_path / "model", num_key_value_heads=4)
    tensors = load_file(model / "model.safetensors")
    for name in list(tensors):
        if name.endswith("v_proj.weight"):
            by = torch.ones(tensors[name].shape[0])
            by[::16] = 30.0  # and the output projection undoes it
            output = name.replace("v_proj", "o_proj")
            tensors[name] = tensors[name] * by[:, None]
            tensors[output] = tensors[output] / by
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    plain = cache_scales(model, tmp_path / "plain", [{"rtn": AWQ}, INT8_CACHE])
    whole = cache_scales(model, tmp_path / "whole", [{"awq": AWQ}, INT8_CACHE])
    parted = cache_scales(model, tmp_path / "parted", [{"awq": {}}, {"rtn": AWQ}, INT8_CACHE])
    for before, one, two in zip(plain, whole, parted, strict=True):
        assert one[1] < 0.7 * before[1]
        for ours, theirs in zip(one, two, strict=True):
            assert abs(ours / theirs - 1) < 0.25  # rounded weights beside float ones
